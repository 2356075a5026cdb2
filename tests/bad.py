"""What the tests of bad and of generated input share."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

ops = torch.ops.fastvae
INF, NAN = math.inf, math.nan
V, T = ValueError, TypeError
EITHER = (ValueError, TypeError)
# torch's own checks (of the schema, of storage sizes) come before or below ours.
TORCHS = (ValueError, RuntimeError)

backends = pytest.mark.parametrize("backend", ["cpp", "eager"])


def full(
    *shape: int, value: float = 0.5, dtype: Any = torch.float32, device: str = "cpu"
) -> Tensor:
    return torch.full(shape, value, dtype=dtype, device=device)


f64, i64, u8, bool_, c64 = (
    partial(full, dtype=d)
    for d in (torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64)
)
meta = partial(full, device="meta")


def odd(kind: str, t: Tensor) -> Tensor:
    """A tensor that is not a plain strided one; torch warns that some of these are prototypes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "sparse":
            return t.to_sparse()
        if kind == "csr":
            return t.to_sparse_csr()
        if kind == "mkldnn":
            return t.to_mkldnn()
        if kind == "nested":
            return torch.nested.nested_tensor(list(t))
        return torch.quantize_per_tensor(t, 0.1, 0, torch.quint8)


class Bad(NamedTuple):
    changes: dict[str, Any]  # to a good call's arguments
    error: Any
    match: str


def bad(error: Any, match: str, **changes: Any) -> Bad:
    return Bad(changes, error, match)


def shapes(name: str, *wrong: Sequence[int], label: str = "") -> list[Bad]:
    """A wrong shape for `name`: both its shape and its name must be in the message."""
    return [
        bad(V, f"{label or name}.*{re.escape(str(list(s)))}", **{name: full(*s)}) for s in wrong
    ]


MU = full(4, 6)
X = full(4, 5)


LATENTS = {"mu": MU, "logvar": MU}


def show(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        size = "" if value.is_nested else list(value.shape)
        words = [str(value.dtype)[6:], str(size), layout, value.device.type]
        return "-".join(w for w in words if w not in ("", "strided", "cpu", "float32"))
    if isinstance(value, partial):
        return f"{value.func.__name__}({', '.join(show(v) for v in value.keywords.values())})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(show(v) for v in value)})"
    return type(value).__name__ if len(repr(value)) > 24 else repr(value)


def table(named: dict[str, list[Bad]]) -> list[Any]:
    return [
        pytest.param(
            name, case, id=f"{name}-{', '.join(f'{k}={show(v)}' for k, v in case[0].items())}"
        )
        for name, cases in named.items()
        for case in cases
    ]


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_of(part)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


def rejects(
    case: Bad, call: Callable[[], Any], given: dict[str, Any], one_line: bool = True
) -> None:
    """`call` raises as the case says, in one line, and changes no input."""
    inputs = [t for t in tensors_of(given) if t.layout == torch.strided and t.device.type == "cpu"]
    inputs = [t for t in inputs if not (t.is_nested or t.is_quantized)]
    before = [(t.detach().clone(), t._version, t.stride(), t.requires_grad) for t in inputs]
    with pytest.raises(case.error) as caught:
        call()
    lines = str(caught.value).splitlines()
    assert re.search(case.match, lines[0]), lines[0]
    # torch explains a missing kernel, or a call that doesn't fit the schema, in many lines.
    assert len(lines) == 1 or not one_line, str(caught.value)
    for t, (value, version, stride, requires_grad) in zip(inputs, before, strict=True):
        assert (t._version, t.stride(), t.requires_grad) == (version, stride, requires_grad)
        torch.testing.assert_close(t.detach(), value, rtol=0, atol=0, equal_nan=True)
