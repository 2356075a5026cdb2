"""The documentation: the site builds and renders offline, its code runs, its reference is whole."""

import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import types
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fastvae

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TOOLS = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python", "latex2mathml")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--virtual-time-budget=5000", "--timeout=20000", "--dump-dom"),
)


def has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; building it is a test too, as --strict makes every warning an error."""
    if missing := [tool for tool in TOOLS if not has(tool)]:
        pytest.skip(f"the documentation needs {', '.join(missing)}")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement, at each build
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    output = run.stdout + run.stderr
    assert run.returncode == 0, output
    assert "WARNING" not in output, output
    return out


def test_the_site_builds(site: Path) -> None:
    for page in PAGES:
        assert (site / page.with_suffix(".html").name).is_file()
    assert not list(site.rglob("*.py")), "the hook belongs to the build, not to the site"


def test_the_readme_links_to_what_the_pages_have(site: Path) -> None:
    """mkdocs checks the links between pages, not those of README.md."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(docs/(\w[\w-]*)\.md(?:#([\w-]+))?\)", text)
    assert {page for page, _ in links} == {p.stem for p in PAGES}, "README.md leads to every page"
    for page, anchor in links:
        rendered = (site / f"{page}.html").read_text(encoding="utf-8")
        assert not anchor or f'id="{anchor}"' in rendered, f"{page}.md has no #{anchor}"
    headings = {
        re.sub(r"\W+", "-", h.lower()) for h in re.findall(r"^## (.+)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= headings


class Document(HTMLParser):
    """What a rendered page holds: its elements with the addresses they load, and its text."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []  # not <a>: a link is followed by the reader only
        self.headings = ""
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "a":
            self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "data") and v]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("h1", "h2"):
            self.headings += data


@pytest.mark.parametrize(
    ("page", "heading"), [("index.html", "fastvae"), ("elbo.html", "The loss, term by term")]
)
def test_a_page_renders_from_the_file_system(
    page: str, heading: str, site: Path, tmp_path: Path
) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    address = (site / page).as_uri() + "?q=likelihood"  # the search runs from file:// as well
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path}", address]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    rendered = Document(run.stdout)
    assert heading in rendered.headings
    assert rendered.tags.count("math") >= 1
    assert "arithmatex" not in run.stdout, "a formula was left as LaTeX"
    assert re.search(r"\d+ matching documents", run.stdout)
    remote = [a for a in rendered.loads if re.match(r"(https?:)?//", a)]
    assert not remote
    for sheet in [*site.rglob("*.css")]:
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line, code) of each Python block."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in found]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.stem)
def test_the_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace. `# needs: name` at the top of a block: a module, or an object in
    one, without which the block is left out."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # classes look their module up
    for line, code in blocks(page):
        compiled = compile("\n" * line + code, page.name, "exec")
        needs = re.match(r"# needs: (\S+)\n", code)
        with warnings.catch_warnings():
            if needs:
                warnings.simplefilter("ignore")  # those of the other library
                try:
                    pkgutil.resolve_name(needs[1])
                except (ImportError, AttributeError):
                    continue
            exec(compiled, module.__dict__)


def test_the_reference_is_whole() -> None:
    text = re.sub(r"<!--.*?-->", "", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    documented = set(re.findall(r"^::: fastvae\.(\S+)$", text, re.MULTILINE))
    public = {n for n in fastvae.__all__ if not isinstance(getattr(fastvae, n), types.ModuleType)}
    families = {f"likelihoods.{n}" for n in fastvae.likelihoods.__all__ if n != "registry"}
    missing = (public | families) - documented
    assert not missing, f"docs/api.md lacks {', '.join(sorted(missing))}"
