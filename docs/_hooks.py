"""MkDocs hook: LaTeX becomes MathML when the site is built, so that no page needs a script for it.

`pymdownx.arithmatex` (generic) marks the formulas; browsers draw MathML themselves.
"""

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def _mathml(match: re.Match[str]) -> str:
    tag, latex = match.groups()
    block = tag == "div"
    math = convert(html.unescape(latex).strip(), display="block" if block else "inline")
    return f'<div class="formula">{math}</div>' if block else math


def on_page_content(content: str, **_: object) -> str:
    """Replaces every marked formula of a page."""
    return _FORMULA.sub(_mathml, content)
