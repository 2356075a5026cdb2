"""Bad input: every bad call raises one line that names the argument and says what came, and leaves
its inputs alone; whatever is accepted, in any layout, gives the float64 answer."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import require
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastvae
from fastvae import likelihoods
from fastvae.likelihoods import Bernoulli, BernoulliProbs, Gaussian, Likelihood

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


# --- the bad calls ---


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


def not_dense(name: str, t: Tensor, label: str = "") -> list[Bad]:
    label = label or name
    kinds = ("sparse", "csr", "mkldnn", "nested") if t.dim() > 1 else ("sparse",)
    return [
        *(
            bad(EITHER, rf"{label}\b.*({kind}|layout|dense|strided)", **{name: odd(kind, t)})
            for kind in kinds
        ),
        bad(T, rf"{label}\b.*quint8", **{name: odd("quantized", t)}),
    ]


def no_tensor(name: str, label: str = "") -> list[Bad]:
    label = label or name
    return [
        bad(T, rf"{label}\b.*list", **{name: [[0.5]]}),
        bad(T, rf"{label}\b.*float", **{name: 0.5}),
        bad(T, rf"{label}\b.*str", **{name: "t"}),
        bad(T, rf"{label}\b.*ndarray", **{name: np.zeros((4, 6))}),
        bad(T, rf"{label}\b.*(type|Tensor)", **{name: Tensor}),
    ]


def not_floating(name: str, *shape: int, label: str = "") -> list[Bad]:
    kinds = (torch.int64, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)
    return [
        bad(T, rf"{label or name}\b.*{str(d)[6:]}", **{name: torch.zeros(shape).to(d)})
        for d in kinds
    ]


# fmt: off
LATENT = [
    *no_tensor("mu"),
    *no_tensor("logvar"),
    *not_floating("mu", 4, 6),
    *not_floating("logvar", 4, 6),
    *not_dense("mu", full(4, 6)),
    *not_dense("logvar", full(4, 6)),
    *shapes("logvar", (4, 5), (3, 6), (4, 1), (1, 6), (6,), (4, 6, 1), (0, 6), ()),
    bad(V, r"mu.*\[\]", mu=full(), logvar=full()),
    bad(T, "mu.*logvar.*float32.*float64", logvar=f64(4, 6)),
    bad(T, "mu.*logvar.*float16.*float32", mu=full(4, 6, dtype=torch.float16)),
    bad(V, "mu.*logvar.*cpu.*meta", logvar=meta(4, 6)),
    bad(V, "mu.*logvar.*meta.*cpu", mu=meta(4, 6)),
]
SAMPLING = [
    *(bad(V, f"num_samples.*{k}", num_samples=k) for k in (0, -1, -(2**62))),
    *(bad(T, "num_samples.*float", num_samples=k) for k in (2.0, NAN)),
    bad(T, "num_samples.*str", num_samples="2"),
    bad(T, "num_samples.*bool", num_samples=True),
    bad(T, "num_samples.*Tensor", num_samples=torch.tensor(2)),
    bad(T, "num_samples.*tuple", num_samples=(2,)),
    bad(TORCHS, r"num_samples|\[4611686018427387904", num_samples=2**62),
    *(bad(EITHER, "num_samples", num_samples=k) for k in (2**63, 2**100)),
    *(bad(V, f"sample_offset.*{k}", sample_offset=k) for k in (-1, -(2**62))),
    bad(T, "sample_offset.*float", sample_offset=0.0),
    bad(T, "sample_offset.*NoneType", sample_offset=None),
    bad(T, "sample_offset.*bool", sample_offset=False),
    # Past the 64-bit index the stream repeats, or ends in the middle of a row.
    *(bad(EITHER, "sample_offset", sample_offset=k)
      for k in (2**61, 2**62, 2**63 - 1, 2**63, 2**100)),
    bad(T, "generator.*int", generator=0),
    bad(T, "generator.*str", generator="cpu"),
    bad(T, "generator.*module", generator=torch),
]
MU = full(4, 6)
PRIOR = [
    *(bad(T, r"prior.*got", prior=p) for p in (0.0, "ab", {"a": MU}, MU, (), (MU,), (MU,) * 3)),
    bad(T, r"prior.*got", prior=((MU, MU),)),
    bad(T, r"prior.*tuple", prior=((MU, MU), MU)),
    bad(T, r"prior.*NoneType", prior=(None, MU)),
    bad(T, r"prior.*float", prior=(0.0, 0.0)),
    bad(T, r"prior.*int64", prior=(MU, i64(4, 6))),
    bad(T, r"prior.*complex64", prior=(c64(4, 6), MU)),
    bad(T, r"prior.*float64", prior=(f64(4, 6), f64(4, 6))),
    *(
        bad(V, r"prior.*\[4, 6\].*" + re.escape(str(list(s))), prior=(MU, full(*s)))
        for s in ((3, 6), (4, 5), (4,), (2, 4, 6), (1, 4, 6), (4, 6, 1), (0, 6))
    ),
    bad(V, r"prior.*meta", prior=(MU, meta(4, 6))),
    bad(EITHER, r"prior.*(sparse|layout|dense|strided)", prior=(odd("sparse", MU), MU)),
]
X = full(4, 5)
PAIR = {"likelihood": "gaussian_logvar"}
PROBS = {"likelihood": "bernoulli_probs"}
RECON = [
    *no_tensor("x"),
    bad(T, r"x\b.*NoneType", x=None),
    *(bad(T, rf"x\b.*{str(d)[6:]}", x=torch.zeros(4, 5).to(d))
      for d in (torch.int64, torch.int8, torch.complex64, torch.float8_e4m3fn)),
    *not_dense("x", X),
    *shapes("x", (4, 4), (3, 5), (4, 5, 1), (4,), (1, 5), (4, 1), (0, 5)),
    bad(V, r"x\b.*\[\]", x=full()),
    bad(V, r"x\b.*\[\]", x=full(), recon=full()),
    bad(V, r"x\b.*\[\]", x=full(), recon=full(3)),
    bad(V, r"meta.*cpu", x=meta(4, 5)),
    *(bad(V, rf"(?i)x\b.*0, 1.*{v}", x=full(4, 5, value=v)) for v in (1.5, -0.25, NAN, INF, -INF)),
    bad(V, r"x\b.*0, 1.*2", x=torch.full((4, 5), 2, dtype=torch.uint8)),
    bad(V, r"x\b.*0, 1.*1\.0000", x=f64(4, 5, value=1 + 1e-9), recon=f64(4, 5)),
    # What is masked out is not what is wrong.
    bad(V, r"x\b.*0, 1.*\b2\b", x=torch.tensor([[NAN, 2.0, 0.5, 0.5, 0.5]] * 4),
        mask=torch.tensor([False, True, True, True, True])),
    bad(T, r"recon.*NoneType", recon=None),
    bad(T, r"recon.*float", recon=0.5),
    bad(T, r"recon.*str", recon="t"),
    bad(T, r"recon.*dict", recon={"logits": X}),
    bad(T, r"recon.*ndarray", recon=np.zeros((4, 5))),
    bad(T, r"recon.*generator", recon=(t for t in (X,))),
    bad(T, r"logits.*float", recon=[0.5]),
    bad(T, r"logits.*tuple", recon=((X,),)),
    bad(T, r"logits.*NoneType", recon=(None,)),
    *(bad(V, rf"recon.*logits.*{n}", recon=(X,) * n) for n in (0, 2, 3, 9)),
    *(bad(V, rf"recon.*mean, logvar.*{n}", recon=(X,) * n, **PAIR) for n in (0, 1, 3)),
    bad(V, r"recon.*mean, logvar.*1", recon=X, **PAIR),
    *not_floating("recon", 4, 5, label="logits"),
    *not_dense("recon", X, label="logits"),
    *shapes("recon", (), (4, 4), (3, 5), (5,), (1, 5), (2, 4, 4), (2, 3, 5), (4, 2, 5),
            (4, 5, 1), (1, 2, 4, 5), (0, 4, 5), (0, 5), label="logits"),
    bad(V, r"logits.*cpu.*meta", recon=meta(4, 5)),
    *(bad(V, rf"(?i)probs.*0, 1.*{v}", recon=full(4, 5, value=v), **PROBS)
      for v in (1.5, -0.25, NAN, INF, -INF)),
    *(bad(V, r"logvar.*" + re.escape(str(list(s))), recon=(X, full(*s)), **PAIR)
      for s in ((3, 5), (4,), (2, 4, 5), (1, 1, 1), (4, 5, 1), (0,))),
    bad(T, r"logvar.*int64", recon=(X, i64(4, 5)), **PAIR),
    bad(T, r"logvar.*list", recon=(X, [0.5]), **PAIR),
    bad(V, r"logvar.*meta", recon=(X, meta(4, 5)), **PAIR),
    bad(EITHER, r"logvar.*(sparse|layout|dense|strided)", recon=(X, odd("sparse", X)), **PAIR),
    *(bad(V, r"logvar.*" + re.escape(str(list(s))), likelihood=partial(Gaussian, logvar=full(*s)))
      for s in ((4,), (3, 5), (1, 1, 1, 1), (2, 4, 5), (0,))),
    bad(V, r"logvar.*meta", likelihood=partial(Gaussian, logvar=meta(5))),
    bad(T, r"logvar.*(int64|Long)", likelihood=partial(Gaussian, logvar=i64(5))),
    bad(T, r"logvar.*(complex64|Complex)", likelihood=partial(Gaussian, logvar=c64(5))),
    bad(EITHER, r"logvar.*(sparse|layout|dense|strided)",
        likelihood=partial(Gaussian, logvar=odd("sparse", full(5)))),
    *(bad(V, "likelihood.*bernoulli.*bernoulli_probs.*gaussian.*gaussian_logvar.*" + repr(n),
          likelihood=n) for n in ("poisson", "", "Bernoulli", "bernoulli ")),
    bad(T, r"likelihood.*NoneType", likelihood=None),
    bad(T, r"likelihood.*type", likelihood=Bernoulli),
    bad(T, r"likelihood.*int", likelihood=3),
    bad(EITHER, r"[Ll]ikelihood", likelihood=partial(Likelihood)),
    *(bad(T, rf"mask.*bool.*{name}", mask=m) for m, name in (
        (X, "float32"), (i64(4, 5), "int64"), (u8(4, 5), "uint8"), (True, "bool"), ([True], "list"),
        (c64(4, 5), "complex64"))),
    *(bad(V, r"mask.*\[4, 5\].*" + re.escape(str(list(s))), mask=bool_(*s))
      for s in ((4, 4), (3, 5), (4,), (2, 4, 5), (1, 4, 5), (4, 5, 1), (0, 5))),
    bad(V, r"mask.*\[4, 5\].*\[2, 4, 5\]", recon=full(2, 4, 5), mask=bool_(2, 4, 5)),
    bad(V, r"mask.*meta", mask=meta(4, 5, dtype=torch.bool)),
    bad(EITHER, r"mask.*(sparse|layout|dense|strided)", mask=odd("sparse", bool_(4, 5))),
]
NO_LATENT = {"mu": None, "logvar": None}
PER_SAMPLE = [(), (4, 1), (1, 4), (3,), (5,), (1,), (0,), (2, 4)]
LOSS = [
    bad(V, r"mu.*logvar.*kl", **NO_LATENT),
    bad(V, r"mu.*logvar", mu=None),
    bad(V, r"mu.*logvar", logvar=None),
    bad(V, r"mu.*logvar.*kl", prior=(MU, MU), **NO_LATENT),
    bad(V, r"kl.*mu.*logvar", kl=full(4)),
    bad(V, r"kl.*mu.*logvar", kl=full(4), mu=None),
    bad(V, r"kl.*prior", kl=full(4), prior=(MU, MU), **NO_LATENT),
    *(case._replace(changes={**case.changes, **NO_LATENT}) for case in (
        *no_tensor("kl"), *not_floating("kl", 4), *not_dense("kl", full(4)),
        *shapes("kl", *PER_SAMPLE), bad(V, r"kl.*meta", kl=meta(4)))),
    *no_tensor("sample_weight"),
    *not_floating("sample_weight", 4),
    *not_dense("sample_weight", full(4)),
    *shapes("sample_weight", *PER_SAMPLE),
    bad(V, r"sample_weight.*meta", sample_weight=meta(4)),
    *(bad(V, r"mu.*x.*" + re.escape(str(list(s))) + r".*\[4, 5\]", mu=full(*s), logvar=full(*s))
      for s in ((3, 6), (1, 6), (0, 6), (6,))),
    bad(V, r"mu.*x.*meta", mu=meta(4, 6), logvar=meta(4, 6)),
    *(bad(V, rf"beta.*{b}", beta=b) for b in (-1, -0.5, NAN, INF, -INF)),
    bad(EITHER, r"beta", beta=10**400),
    *(bad(T, rf"beta.*{type(b).__name__}", beta=b)
      for b in ("1", None, True, torch.tensor(1.0), [1.0], 1j)),
    *(bad(V, r"reduction.*mean.*sum.*none.*" + re.escape(repr(r)), reduction=r)
      for r in ("avg", "", "MEAN", None, 0, ["mean"])),
]
BACKEND = [
    *(bad(V, "backend.*auto.*cpp.*triton.*eager.*" + re.escape(repr(b)), backend=b)
      for b in ("cuda", "", "CPP", None, 3, ["cpp"])),
    bad(V, "backend.*triton", backend="triton"),
]
# fmt: on


def through_module(terms: bool, **given: Any) -> Any:
    own = ("likelihood", "beta", "reduction", "backend")
    criterion = fastvae.ELBOLoss(**{k: given.pop(k) for k in own if k in given})
    return criterion.terms(**given) if terms else criterion(**given)


LATENTS = {"mu": MU, "logvar": MU}
DATA = {"x": X, "recon": X}
ON_LOSS = [*LATENT, *PRIOR, *RECON, *LOSS, *BACKEND]
SAME_PATH = [*ON_LOSS[::9], *BACKEND]  # of what elbo_loss goes through too
PUBLIC: dict[str, tuple[Callable[..., Any], dict[str, Any], list[Bad]]] = {
    "rsample": (fastvae.rsample, LATENTS, [*LATENT, *SAMPLING, *BACKEND]),
    "rsample_kl": (fastvae.rsample_kl, LATENTS, [*LATENT, *SAMPLING, *PRIOR, *BACKEND]),
    "kl_divergence": (fastvae.kl_divergence, LATENTS, [*LATENT, *PRIOR, *BACKEND]),
    "log_likelihood": (fastvae.log_likelihood, DATA, [*RECON, *BACKEND]),
    "elbo_loss": (fastvae.elbo_loss, DATA | LATENTS, ON_LOSS),
    "elbo_terms": (fastvae.elbo_terms, DATA | LATENTS, SAME_PATH),
    "ELBOLoss": (partial(through_module, False), DATA | LATENTS, SAME_PATH),
    "ELBOLoss.terms": (partial(through_module, True), DATA | LATENTS, SAME_PATH),
}


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


@backends
@pytest.mark.parametrize("name", PUBLIC)
def test_the_good_call_that_the_bad_ones_change(name: str, backend: str) -> None:
    function, good, _ = PUBLIC[name]
    function(**good, backend=require(backend))


@backends
@pytest.mark.parametrize("name, case", table({name: p[2] for name, p in PUBLIC.items()}))
def test_public_function(name: str, case: Bad, backend: str) -> None:
    function, good, _ = PUBLIC[name]
    given = {**good, "backend": require(backend), **case.changes}

    def call() -> None:
        likelihood = given.get("likelihood", "bernoulli")  # made here: it may be what raises
        made = likelihood() if isinstance(likelihood, partial) else likelihood
        function(**({**given, "likelihood": made} if "likelihood" in given else given))

    rejects(case, call, given)


@pytest.mark.parametrize("name", PUBLIC)
def test_cpp_serves_no_other_device(name: str) -> None:
    function, good, _ = PUBLIC[name]
    other = {k: v.to("meta") for k, v in good.items()}
    case = bad(V, "cpp.*meta")
    rejects(case, lambda: function(**other, backend=require("cpp")), {})


MAKERS: dict[str, Callable[..., Any]] = {
    "Gaussian": Gaussian,
    "BernoulliProbs": BernoulliProbs,
    "ELBOLoss": fastvae.ELBOLoss,
    "get": likelihoods.get,
}
MADE = {
    "Gaussian": [
        *(bad(V, f"scale.*{s}", scale=s) for s in (0, 0.0, -1.5, NAN, INF, -INF)),
        *(bad(EITHER, "scale", scale=s) for s in ("a", "2", [1.0], (), 1j, full(2), 10**400)),
        bad(V, "scale.*logvar", scale=1.0, logvar="learned"),
        bad(V, "normalized.*logvar", normalized=False, logvar="per_element"),
        *(
            bad(EITHER, "logvar", logvar=v)
            for v in ("", "Learned", 0.0, [0.0], True, np.zeros(3), Tensor)
        ),
    ],
    "BernoulliProbs": [
        *(bad(V, f"log_min.*{m}", log_min=m) for m in (0, 0.0, 1.0, NAN, -INF, INF)),
        *(bad(EITHER, "log_min", log_min=m) for m in ("a", "-2", None, [-1.0], 1j, full(2))),
        *(bad(EITHER, "log_min", log_min=m) for m in (-(10**400), False)),
    ],
    "ELBOLoss": [
        bad(V, "likelihood.*bernoulli.*poisson", likelihood="poisson"),
        bad(T, "likelihood.*NoneType", likelihood=None),
        bad(T, "likelihood.*type", likelihood=Gaussian),
        *(bad(V, "reduction.*mean.*sum.*none", reduction=r) for r in ("avg", None, 1)),
    ],
    "get": [
        bad(V, "likelihood.*bernoulli.*'x'", likelihood="x"),
        bad(T, "likelihood.*list", likelihood=["bernoulli"]),
    ],
}


@pytest.mark.parametrize("name, case", table(MADE))
def test_constructor(name: str, case: Bad) -> None:
    rejects(case, lambda: MAKERS[name](**case.changes), case.changes)


@backends
@pytest.mark.parametrize("scale", [1e-200, 1e-25, 1e25, 1e200])
def test_extreme_scale_is_an_error_or_right(scale: float, backend: str) -> None:
    x, mean = f64(2, 3, value=scale).float(), f64(2, 3, value=-scale).float()
    if not x.isfinite().all():
        x, mean = full(2, 3), full(2, 3)
    z = (x.double() - mean.double()) / scale
    expected = (-0.5 * z**2 - math.log(scale) - 0.5 * math.log(2 * math.pi)).sum(1)
    try:
        got = fastvae.log_likelihood(x, mean, Gaussian(scale=scale), backend=require(backend))
    except ValueError as error:
        assert re.search("scale", str(error))  # noqa: PT017
    else:
        torch.testing.assert_close(got, expected.float())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backends_agree_on_the_dtype_of_a_weighted_loss(reduction: str) -> None:
    given: dict[str, Any] = {**DATA, "kl": full(4), "sample_weight": f64(4)}
    given["reduction"] = reduction
    dtypes = {b: fastvae.elbo_loss(**given, backend=require(b)).dtype for b in ("cpp", "eager")}
    assert dtypes["cpp"] == dtypes["eager"]


# --- raw operators ---

SEED = torch.tensor([7])
Z = {"seed": SEED, "num_samples": None, "sample_offset": 0}
NO_PRIOR: dict[str, Any] = {"prior_mu": None, "prior_logvar": None}
FAMILY: dict[str, Any] = {"x": X, "params": [X], "family": "bernoulli", "options": [], "mask": None}
RAW_GOOD: dict[str, dict[str, Any]] = {
    "seed": {"like": X, "generator": None},
    "noise": {"seed": SEED, "size": [4, 6], "num_samples": 1, "sample_offset": 0},
    "rsample": {**LATENTS, **Z},
    "rsample_kl": {**LATENTS, **Z},
    "rsample_backward": {"grad_z": MU, "grad_kl": full(4), **LATENTS, **Z},
    "kl_divergence": {**LATENTS, **NO_PRIOR},
    "kl_divergence_backward": {"grad": full(4), **LATENTS, **NO_PRIOR, "needs": [True] * 4},
    "log_likelihood": FAMILY,
    "log_likelihood_forward": {**FAMILY, "weight": full(4), "scale": 1.0, "needs": [True] * 4},
    "elbo": {**FAMILY, "kl": full(4), "weight": full(4), "beta": 1.0, "reduction": "mean"},
    "elbo_reduce": {
        "log_likelihood": full(2, 4), "kl": full(4), "weight": full(4), "beta": 1.0,
        "reduction": "sum",
    },
}  # fmt: skip
RAW_LATENT = [
    *shapes("logvar", (4, 5), (3, 6), (4, 1), (1, 6), (6,), (0, 6), (), label="mu"),
    bad(V, r"mu.*\[\]", mu=full(), logvar=full()),
    bad(T, "mu.*Long", mu=i64(4, 6)),
    bad(T, "mu.*ComplexFloat", mu=c64(4, 6), logvar=c64(4, 6)),
    bad(T, "logvar.*Long", logvar=i64(4, 6)),
    bad(NotImplementedError, "fastvae::.*Sparse", mu=odd("sparse", MU), logvar=odd("sparse", MU)),
    bad(RuntimeError, "'mu'.*list", mu=[0.5]),
    bad(TORCHS, "mu|logvar|device", logvar=None),  # torch makes it an undefined tensor
]
RAW_SEED = [
    *(bad(T, "seed.*int64", seed=torch.ones(1, dtype=d)) for d in (torch.float32, torch.int32)),
    *(bad(V, rf"seed.*\[{n}\]", seed=torch.ones(n, dtype=torch.int64)) for n in (0, 2)),
    bad(RuntimeError, "'seed'.*int", seed=7),
    *(bad(V, f"num_samples.*{k}", num_samples=k) for k in (0, -1, -(2**63))),
    bad(TORCHS, r"num_samples|\[4611686018427387904|grad_z", num_samples=2**62),
    *(bad(RuntimeError, "'num_samples'", num_samples=k) for k in (2**63, 1.5, "2")),
    *(bad(V, "sample_offset", sample_offset=k) for k in (-1, -5, -(2**63), 2**61, 2**63 - 1)),
    *(bad(RuntimeError, "'sample_offset'", sample_offset=k) for k in (2**63, None, 0.5)),
]
RAW_DATA = [
    *shapes("x", (4, 4), (3, 5), (4,), (4, 5, 1), (1, 5), (0, 5)),
    bad(V, r"x\b.*\[\]", x=full()),
    bad(V, r"x\b.*\[\]", x=full(), params=[full()]),
    bad(V, r"x\b.*\[\]", x=full(), params=[full(4)]),
    *(bad(T, rf"x\b.*{n}", x=torch.zeros(4, 5).to(d)) for d, n in (
        (torch.int64, "Long"), (torch.int8, "Char"), (torch.complex64, "ComplexFloat"),
        (torch.float8_e4m3fn, "Float8"))),
    bad(V, r"x\b.*0, 1.*1.5", x=full(4, 5, value=1.5)),
    bad(NotImplementedError, "fastvae::.*Sparse", x=odd("sparse", X)),
    bad(NotImplementedError, "fastvae::.*Sparse", params=[odd("sparse", X)]),
    *(bad(V, r"logits.*" + re.escape(str(list(s))), params=[full(*s)])
      for s in ((4, 4), (3, 5), (5,), (1, 2, 4, 5), (2, 3, 5))),
    bad(T, "logits.*Long", params=[i64(4, 5)]),
    *(bad(V, rf"bernoulli.*1 param.*{n}", params=[X] * n) for n in (2, 3)),
    bad(V, r"gaussian_logvar.*2 param.*1", family="gaussian_logvar", options=[0.0]),
    *(bad(V, r"logvar.*" + re.escape(str(list(s))), params=[X, full(*s)], family="gaussian_logvar",
          options=[0.0]) for s in ((4,), (5,), (1, 5), (3, 1), (2, 4, 5), (1, 1, 1))),
    *(bad(V, "likelihood.*bernoulli.*gaussian_logvar", family=n) for n in ("x", "", "normal_kl")),
    bad(V, r"bernoulli.*0 options.*1", options=[1.0]),
    bad(V, r"gaussian.*2 options.*0", family="gaussian"),
    *(bad(V, r"mask.*" + re.escape(str(list(s))), mask=bool_(*s)) for s in ((5,), (4, 1), (3, 5))),
    bad(T, r"mask.*Float", mask=X),
    bad(RuntimeError, "'params'", params=X),
    bad(RuntimeError, "'params'", params=[None]),
    bad(RuntimeError, "'family'", family=None),
    bad(RuntimeError, "'options'", options=["a"]),
]  # fmt: skip
RAW_WEIGHT = [
    *shapes("weight", (3,), (1,), (), (4, 1)),
    bad(T, "weight.*Bool", weight=bool_(4)),
]
RAW_LOSS = [
    *RAW_WEIGHT,
    *shapes("kl", (3,), (), (4, 1), (1,)),
    bad(T, "kl.*Long", kl=i64(4)),
    *(bad(V, "reduction.*mean.*sum.*none", reduction=r) for r in ("avg", "")),
    bad(RuntimeError, "'beta'", beta="1"),
]
RAW: dict[str, list[Bad]] = {
    "seed": [
        bad(RuntimeError, "'like'", like=[0.5]),
        bad(RuntimeError, "'generator'", generator=3),
        bad(NotImplementedError, "fastvae::.*Sparse", like=odd("sparse", X)),
    ],
    "noise": [
        *RAW_SEED,
        *(bad(TORCHS, "size", size=s) for s in ([], [-1], [-4, 6])),
        *(bad(TORCHS, "size|overflow", size=s) for s in ([2**40] * 2, [2**62, 4], [2**63 - 1])),
        *(bad(TORCHS, "size|overflow|dimension", size=s) for s in ([4, -6], [-1, -1])),
        bad(RuntimeError, "'size'", size=[1.5]),
    ],
    "rsample": [*RAW_LATENT, *RAW_SEED, bad(T, "mu.*logvar.*Float.*Double", logvar=f64(4, 6))],
    "rsample_kl": [*RAW_LATENT, *RAW_SEED],
    "rsample_backward": [
        *RAW_LATENT,
        *RAW_SEED,
        *shapes("grad_z", (4, 5), (1, 4, 6), (6,), ()),
        *shapes("grad_kl", (3,), (1,), (4, 1), ()),
        bad(T, "grad_z.*Long", grad_z=i64(4, 6)),
        bad(T, "grad_kl.*Long", grad_kl=i64(4)),
    ],
    "kl_divergence": [
        *RAW_LATENT,
        bad(V, "prior.*one", prior_mu=MU),
        bad(V, "prior.*one", prior_logvar=MU),
        bad(V, r"(prior|mu).*\[1, 6\]", prior_mu=MU, prior_logvar=full(1, 6)),
        bad(T, "prior.*Long", prior_mu=MU, prior_logvar=i64(4, 6)),
    ],
    "kl_divergence_backward": [
        *RAW_LATENT,
        *shapes("grad", (3,), (1,), (4, 1), ()),
        bad(T, "grad.*Long", grad=i64(4)),
        *(bad(RuntimeError, "size 4", needs=[True] * n) for n in (0, 3, 5)),
    ],
    "log_likelihood": RAW_DATA,
    "log_likelihood_forward": [
        *RAW_DATA,
        *RAW_WEIGHT,
        *(bad(RuntimeError, "size 4", needs=[True] * n) for n in (0, 3, 5)),
    ],
    "elbo": [*RAW_DATA, *RAW_LOSS],
    "elbo_reduce": [
        *RAW_LOSS,
        *shapes("log_likelihood", (3,), (2, 3), (1, 2, 4), (4, 1), ()),
        bad(T, "log_likelihood.*Long", log_likelihood=i64(4)),
    ],
}


def require_grad(value: Any) -> Any:
    if isinstance(value, list):
        return [require_grad(v) for v in value]
    if isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided:
        return value.detach().requires_grad_()
    return value


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name, case", table(RAW))
def test_raw_operator(name: str, case: Bad, grad: bool) -> None:
    require("cpp")
    given = {**RAW_GOOD[name], **case.changes}
    given = {k: require_grad(v) for k, v in given.items()} if grad else given
    torchs = case.error in (RuntimeError, NotImplementedError)
    rejects(case, lambda: getattr(ops, name)(**given), given, one_line=not torchs)


@pytest.mark.parametrize("name", RAW_GOOD)
def test_the_good_operator_call(name: str) -> None:
    require("cpp")
    getattr(ops, name)(**RAW_GOOD[name])


# What a mistake in the operators turns into a crash runs in a process of its own.
HOSTILE = {
    "no_params": "ops.log_likelihood(x, [], 'bernoulli', [])",
    "no_params_with_grad": "ops.log_likelihood(x.requires_grad_(), [], 'bernoulli', [])",
    "no_params_elbo": "ops.elbo(x, [], x[:, 0], 'bernoulli', [], None, None, 1.0, 'mean')",
    "many_params": "ops.log_likelihood(x, [x] * 5000, 'bernoulli', [])",
    "many_params_elbo": "ops.elbo(x, [x] * 5000, x[:, 0], 'bernoulli', [], None, None, 1., 'sum')",
    "no_params_vmap": "vmap(lambda a: ops.log_likelihood(a, [], 'bernoulli', []))(x[None])",
    "no_params_grad": "grad(lambda a: ops.log_likelihood(a, [], 'bernoulli', []).sum())(x)",
    "no_params_meta": "ops.log_likelihood(x.to('meta'), [], 'bernoulli', [])",
    "one_param_of_two_vmap": "vmap(lambda a: ops.log_likelihood(a, [a], pair, [0.]))(x[None])",
    "offset_past_the_end": "fastvae.rsample(wide, wide, num_samples=3, sample_offset=2**63 - 1)",
}  # fmt: skip
HOST = """
import sys, torch, fastvae
from torch.func import grad, vmap
ops = torch.ops.fastvae
for call in sys.argv[1:]:
    x, wide, pair = torch.rand(4, 5), torch.zeros(1, 1500), 'gaussian_logvar'
    try:
        eval(call)
        print("returned", flush=True)
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[:1], flush=True)
"""


@pytest.fixture(scope="module")
def hostile() -> dict[str, str]:
    """What came of each call; a call that ends the process is named, and the rest run again."""
    require("cpp")
    root = str(Path(fastvae.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    outcomes: list[str] = []
    calls = list(HOSTILE.values())
    while len(outcomes) < len(calls):
        command = [sys.executable, "-c", HOST, *calls[len(outcomes) :]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        outcomes += done.stdout.splitlines()
        if done.returncode:
            outcomes.append(f"exit code {done.returncode}: {done.stderr[-300:]}")
    return dict(zip(HOSTILE, outcomes, strict=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_call_raises_and_does_not_crash(name: str, hostile: dict[str, str]) -> None:
    outcome = hostile[name]
    assert re.match(r"(ValueError|TypeError) \['.*(param|sample_offset)", outcome), outcome


# --- between forward and backward ---


def tensors_of_a_loss(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    randn = partial(torch.randn, dtype=torch.float64)
    made = {n: randn(4, 6).to(dtype) for n in ("mu", "logvar", "prior_mu", "prior_logvar")}
    made |= {"recon": randn(4, 5).to(dtype), "x": torch.rand(4, 5)}
    return {**made, "sample_weight": torch.rand(4), "mask": torch.rand(4, 5) > 0.3}


def masked_weighted_loss(given: dict[str, Tensor], backend: str) -> Tensor:
    rest: dict[str, Any] = {k: v for k, v in given.items() if not k.startswith("prior")}
    prior = (given["prior_mu"], given["prior_logvar"])
    return fastvae.elbo_loss(**rest, prior=prior, backend=backend, reduction="sum")


@backends
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("changed", tensors_of_a_loss(torch.float32))
def test_change_in_place_before_backward_raises_or_does_not_matter(
    changed: str, dtype: torch.dtype, create_graph: bool, backend: str
) -> None:
    require(backend)
    grads = []
    for change in (False, True):
        given = tensors_of_a_loss(dtype)
        leaves = [given[n].requires_grad_() for n in ("mu", "logvar", "recon")]
        used = {k: v * 1 if v.requires_grad else v for k, v in given.items()}
        loss = masked_weighted_loss(used, backend)
        with torch.no_grad():
            if change and changed == "mask":
                used[changed].logical_not_()
            elif change:
                used[changed].mul_(0.5)
        try:
            grads.append(torch.autograd.grad(loss, leaves, create_graph=create_graph))
        except RuntimeError as error:
            assert change and "modified by an inplace operation" in str(error)  # noqa: PT017
            return
    for before, after in zip(*grads, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_twice(dtype: torch.dtype, backend: str) -> None:
    require(backend)
    given = tensors_of_a_loss(dtype)
    leaves = [given[n].requires_grad_() for n in ("mu", "logvar", "recon")]
    z = fastvae.rsample(given["mu"], given["logvar"], backend=backend).sum()
    loss = masked_weighted_loss(given, backend) + z
    gradients = partial(torch.autograd.grad, loss, leaves)
    first = gradients(torch.tensor(2.0).to(loss), retain_graph=True)
    second = gradients(torch.tensor(2.0).to(loss), retain_graph=True)
    kept = [g.clone() for g in first]
    last = gradients(torch.tensor(1.0).to(loss))
    for f, k, s, one in zip(first, kept, second, last, strict=True):
        torch.testing.assert_close(f, s, rtol=0, atol=0)
        torch.testing.assert_close(f, k, rtol=0, atol=0)  # the last backward wrote nowhere near
        torch.testing.assert_close(f, 2 * one)
    with pytest.raises(RuntimeError, match="second time"):
        gradients()


# --- generated input, any layout ---

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}
Draw = Callable[[Any], Any]
generated = settings(
    max_examples=int(os.environ.get("FASTVAE_EXAMPLES", "120")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SIZES = st.sampled_from([0, 1, 1, 2, 3, 3, 5, 7, 8, 13, 17, 20])


def draw_shape(draw: Draw, most: int = 2500) -> list[int]:
    """[B, *event] with 0 to 5 event dimensions."""
    shape = draw(st.lists(SIZES, min_size=1, max_size=6))
    while math.prod(shape) > most:
        shape[shape.index(max(shape))] = 2
    return shape


def draw_strides(draw: Draw, shape: Sequence[int]) -> list[int]:
    rank = len(shape)
    kinds = ["contiguous", "permuted", "channels_last", "gaps", "expanded", "overlapping", "far"]
    kind = draw(st.sampled_from(kinds))
    order = list(range(rank))  # outermost first
    if kind in ("permuted", "gaps", "expanded"):
        order = draw(st.permutations(order))
    elif kind == "channels_last" and rank > 1:
        order = [0, *order[2:], 1]
    strides, step = [0] * rank, 1
    for d in reversed(order):
        if kind == "expanded" and draw(st.booleans()):
            continue
        step *= draw(st.integers(1, 3)) if kind == "gaps" else 1
        strides[d] = draw(st.integers(0, 3)) if kind == "overlapping" else step
        if kind == "far" and d == order[0]:
            strides[d] += 2**14 + 3
        step *= max(shape[d], 1)
    for d in range(rank):  # a dimension of one may claim anything
        if shape[d] == 1 and draw(st.booleans()):
            strides[d] = draw(st.sampled_from([0, 1, 7, 2**40]))
    return strides


def draw_tensor(
    draw: Draw, shape: Sequence[int], dtype: torch.dtype, low: float, high: float
) -> Tensor:
    """A tensor in some layout; what its storage holds beside it is NaN, or the largest integer."""
    strides, offset = draw_strides(draw, shape), draw(st.integers(0, 5))
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.rand(offset + reach + 3, dtype=torch.float64, generator=generator)
    storage = (low + (high - low) * values).to(dtype)
    if dtype in (torch.uint8, torch.bool):
        storage = (values > 0.5).to(dtype)
    seen = torch.zeros(len(storage), dtype=torch.bool)
    seen[torch.arange(len(storage)).as_strided(shape, strides, offset).flatten()] = True
    storage[~seen] = NAN if dtype.is_floating_point else 255
    return storage.as_strided(shape, strides, offset)


def draw_broadcast(draw: Draw, shape: Sequence[int]) -> list[int]:
    """A shape that broadcasts to this one."""
    kept = [n if draw(st.booleans()) else 1 for n in shape]
    return kept[draw(st.integers(0, len(kept))) :]


def sum_event(terms: Tensor, event_dims: int) -> Tensor:
    return terms.flatten(-event_dims).sum(-1) if event_dims else terms


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def near(ours: Tensor, exact: Tensor, bound: Tensor | float, what: str) -> None:
    assert ours.shape == exact.shape, f"{what}: shape {list(ours.shape)}, not {list(exact.shape)}"
    excess = (ours.double() - exact).abs() - bound
    worst = excess.max().item() if excess.numel() else 0.0
    assert excess.isfinite().all() and worst <= 0, f"{what}: {worst} over the bound"


def compare(
    draw: Draw,
    ours: Callable[..., Tensor],
    plain: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """Values and gradients against `plain`, which gives (value, sum of magnitudes) in float64."""
    leaves = [t.requires_grad_(t.is_floating_point() and draw(st.booleans())) for t in inputs]
    before = [t.detach().clone() for t in leaves]
    value = ours(*leaves)
    exact_leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    exact, size = plain(*exact_leaves)
    assert value.dtype == dtype
    floats = {value_dtype(t.dtype) for t in inputs if t.is_floating_point()}
    least = max(ROUNDING[d] for d in floats)  # a float64 result may hold what float32 gave
    rounding = max(least, ROUNDING[dtype])
    near(value.detach(), exact.detach(), rounding * (1 + size.detach()), "value")
    wanted = [j for j, t in enumerate(leaves) if t.requires_grad]
    if wanted:
        upstream = draw_tensor(draw, value.shape, value.dtype, 0.5, 1.5)
        args = [leaves[j] for j in wanted], [exact_leaves[j] for j in wanted]
        ours_grads = torch.autograd.grad(value, args[0], upstream)
        plain_grads = torch.autograd.grad(exact, args[1], upstream.double())
        for j, got, grad in zip(wanted, ours_grads, plain_grads, strict=True):
            assert got.dtype == leaves[j].dtype
            terms = max(t.numel() for t in inputs) / max(grad.numel(), 1)  # in each element's sum
            scale = 4 * math.sqrt(terms) + (grad.abs().max().item() if grad.numel() else 0.0)
            near(got, grad, max(least, ROUNDING[got.dtype]) * scale, f"gradient of input {j}")
    for t, was in zip(leaves, before, strict=True):
        torch.testing.assert_close(t.detach(), was, rtol=0, atol=0, equal_nan=True)


def plain_kl(mu: Tensor, logvar: Tensor, *prior: Tensor) -> tuple[Tensor, Tensor]:
    mean, lv = prior or (torch.zeros_like(mu), torch.zeros_like(mu))
    d = logvar - lv
    square, phi = (mu - mean) ** 2 * (-lv).exp(), d.expm1() - d
    dims = mu.dim() - 1
    return sum_event(0.5 * (square + phi), dims), sum_event(square + phi.abs() + d.abs(), dims)


def plain_given_kl(kl: Tensor) -> tuple[Tensor, Tensor]:
    return kl, kl.abs()


@backends
@generated
@given(data=st.data())
def test_generated_kl_divergence(data: Any, backend: str) -> None:
    draw, backend = data.draw, require(backend)
    shape, dtype = draw_shape(draw), draw(st.sampled_from(FLOATS))
    sizes = [shape, shape]
    if draw(st.booleans()):
        sizes += [draw_broadcast(draw, shape) for _ in range(2)]
    inputs = [draw_tensor(draw, s, dtype, -2, 2) for s in sizes]

    def ours(mu: Tensor, logvar: Tensor, *given: Tensor) -> Tensor:
        prior: Any = given or None
        return fastvae.kl_divergence(mu, logvar, prior=prior, backend=backend)

    compare(draw, ours, plain_kl, inputs, value_dtype(dtype))


@backends
@generated
@given(data=st.data())
def test_generated_rsample(data: Any, backend: str) -> None:
    draw, backend = data.draw, require(backend)
    shape, dtype = draw_shape(draw), draw(st.sampled_from(FLOATS))
    inputs = [draw_tensor(draw, shape, dtype, -2, 2) for _ in range(2)]
    seed = draw(st.integers(0, 2**40))
    how: dict[str, Any] = {
        "num_samples": draw(st.sampled_from([None, 1, 2, 5])),
        "backend": backend,
    }
    how["sample_offset"] = draw(st.sampled_from([0, 1, 63, 2**33 + 1]))

    def sample(mu: Tensor, logvar: Tensor) -> Tensor:
        return fastvae.rsample(mu, logvar, generator=torch.manual_seed(seed), **how)

    def with_kl(mu: Tensor, logvar: Tensor) -> Tensor:  # both outputs in one tensor
        z, kl = fastvae.rsample_kl(mu, logvar, generator=torch.manual_seed(seed), **how)
        return torch.cat([z.flatten().to(kl.dtype), kl])

    zero = torch.zeros(shape, dtype=torch.float64)
    eps = sample(zero, zero)  # a float32 number, the same for all dtypes

    def plain(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        z = mu + (logvar / 2).exp() * eps
        return z, mu.abs() + z.abs()

    def plain_with_kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        both = zip(plain(mu, logvar), plain_kl(mu, logvar), strict=True)
        value, size = (torch.cat([a.flatten(), b]) for a, b in both)
        # z was rounded to its dtype before it went into this tensor
        return value, size * ROUNDING[dtype] / ROUNDING[value_dtype(dtype)]

    if draw(st.booleans()):
        compare(draw, with_kl, plain_with_kl, inputs, value_dtype(dtype))
    else:
        compare(draw, sample, plain, inputs, dtype)


HALF_LN_2PI = 0.5 * math.log(2 * math.pi)


def plain_bernoulli(x: Tensor, l: Tensor) -> Tensor:
    return x * l - F.softplus(l)


def plain_probs(x: Tensor, p: Tensor) -> Tensor:
    return x * p.log() + (1 - x) * (-p).log1p()


def plain_gaussian(x: Tensor, mean: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / 0.7) ** 2 - math.log(0.7) - HALF_LN_2PI


def plain_gaussian_logvar(x: Tensor, mean: Tensor, lv: Tensor) -> Tensor:
    return -0.5 * (lv + (x - mean) ** 2 * (-lv).exp()) - HALF_LN_2PI


class Drawn(NamedTuple):
    """A reconstruction term: inputs [x, parameters...], the likelihood made from those it holds."""

    inputs: list[Tensor]
    likelihood: Callable[[Sequence[Tensor]], Likelihood]
    given: int  # how many parameters are recon's; the others are the likelihood's own
    plain: Callable[..., Tensor]
    mask: Tensor | None

    def ours(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        recon = tensors[1 : 1 + self.given]
        family = self.likelihood(tensors[1 + self.given :])
        one = recon[0] if self.given == 1 else tuple(recon)
        return {"x": tensors[0], "recon": one, "likelihood": family, "mask": self.mask}

    def exact(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:  # [B] or [K, B], and magnitudes
        x, *params = tensors
        event = x.dim() - 1
        if self.mask is not None:  # what is left out may be NaN
            fill = [t if t.shape[t.dim() - x.dim() :] == x.shape else None for t in params]
            x = torch.where(self.mask, x, 0.5)
            filled = zip(params, fill, strict=True)
            params = [p if f is None else torch.where(self.mask, p, 0.5) for p, f in filled]
        terms = self.plain(x, *params)
        terms = terms if self.mask is None else torch.where(self.mask, terms, 0)
        return sum_event(terms, event), sum_event(terms.abs() + 1, event)


def draw_reconstruction(draw: Draw, shape: list[int], dtype: torch.dtype) -> Drawn:
    kinds = ["bernoulli", "probs", "gaussian", *["per_element"] * 4, "own_logvar"]
    kind = draw(st.sampled_from(kinds))
    samples = draw(st.sampled_from([None, None, 1, 2, 3]))
    full_shape = shape if samples is None else [samples, *shape]
    domain = {"bernoulli": (-6, 6), "probs": (0.05, 0.95)}.get(kind, (-1, 1))
    unit = kind in ("bernoulli", "probs")
    x_dtypes = [*FLOATS, torch.uint8, torch.bool]
    x = draw_tensor(draw, shape, draw(st.sampled_from(x_dtypes)), 0 if unit else -1, 1)
    params = [draw_tensor(draw, full_shape, dtype, *domain)]
    families: dict[str, Callable[[Sequence[Tensor]], Likelihood]] = {
        "bernoulli": lambda own: Bernoulli(),
        "probs": lambda own: BernoulliProbs(),
        "gaussian": lambda own: Gaussian(scale=0.7),
        "per_element": lambda own: Gaussian(logvar="per_element"),
        "own_logvar": lambda own: Gaussian(logvar=own[0]),
    }
    plain = {"bernoulli": plain_bernoulli, "probs": plain_probs, "gaussian": plain_gaussian}
    if kind == "per_element":
        per_row = [*full_shape[: len(full_shape) - len(shape) + 1], *[1] * (len(shape) - 1)]
        sizes = st.sampled_from([full_shape, per_row, per_row, draw_broadcast(draw, full_shape)])
        params.append(draw_tensor(draw, draw(sizes), dtype, -1, 1))
    elif kind == "own_logvar":
        params.append(draw_tensor(draw, draw_broadcast(draw, shape[1:]), dtype, -1, 1))
    mask = None
    if draw(st.booleans()):
        mask = draw_tensor(draw, draw_broadcast(draw, shape), torch.bool, 0, 1)
        hidden = ~mask.expand(shape)
        if draw(st.booleans()) and x.is_floating_point():  # the values left out are NaN
            x = x.masked_fill(hidden, NAN)
            params[0] = params[0].masked_fill(hidden, NAN)
    given = 1 if kind == "own_logvar" else len(params)
    formula = plain.get(kind, plain_gaussian_logvar)
    return Drawn([x, *params], families[kind], given, formula, mask)


@backends
@generated
@given(data=st.data())
def test_generated_log_likelihood(data: Any, backend: str) -> None:
    draw, backend = data.draw, require(backend)
    dtype = draw(st.sampled_from(FLOATS))
    drawn = draw_reconstruction(draw, draw_shape(draw, 1000), dtype)

    def ours(*tensors: Tensor) -> Tensor:
        return fastvae.log_likelihood(**drawn.ours(tensors), backend=backend)

    compare(draw, ours, drawn.exact, drawn.inputs, value_dtype(dtype))


@backends
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("sizes", [(1, 3), (2, 1), (2, 3), (1, 1)], ids=str)
def test_logvar_constant_along_each_row_in_any_layout(
    sizes: tuple[int, int], grad: bool, backend: str
) -> None:
    """[K, B, 1]: the rows of an expanded or a transposed one have no single stride."""
    x, mean = torch.randn(3, 5).double(), torch.randn(2, 3, 5).double()
    stored = torch.randn(*reversed(sizes), 1, dtype=torch.float64).transpose(0, 1)
    stored = stored.requires_grad_(grad)
    logvar = stored.expand(2, 3, 1)
    recon = (mean, logvar)
    got = fastvae.log_likelihood(x, recon, "gaussian_logvar", backend=require(backend))
    expected = plain_gaussian_logvar(x, mean, logvar).sum(-1)
    torch.testing.assert_close(got, expected)
    if grad:
        ours, plain = (torch.autograd.grad(v.square().sum(), stored) for v in (got, expected))
        torch.testing.assert_close(ours, plain)


@backends
@generated
@given(data=st.data())
def test_generated_elbo_loss(data: Any, backend: str) -> None:
    draw, backend = data.draw, require(backend)
    dtype, latent_dtype = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    shape = draw_shape(draw, 700)
    batch = shape[0]
    drawn = draw_reconstruction(draw, shape, dtype)
    latent = [batch, *draw_shape(draw, 100)[1:]]
    plain_latent: Callable[..., tuple[Tensor, Tensor]]
    if draw(st.booleans()):
        names, plain_latent = ["kl"], plain_given_kl
        extra = [draw_tensor(draw, [batch], latent_dtype, 0, 3)]
    else:
        names, plain_latent = ["mu", "logvar"], plain_kl
        extra = [draw_tensor(draw, latent, latent_dtype, -2, 2) for _ in names]
    beta, reduction = draw(st.sampled_from([0, 0.5, 1, 4.0])), draw(st.sampled_from("msn"))
    reduction = {"m": "mean", "s": "sum", "n": "none"}[reduction]
    weight = None
    if draw(st.booleans()):
        floats = st.sampled_from([torch.float32, torch.bfloat16])
        weight = draw_tensor(draw, [batch], draw(floats), 0, 2)
    count = len(drawn.inputs)

    def ours(*tensors: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(names, tensors[count:], strict=True))
        given |= drawn.ours(tensors[:count]) | {"sample_weight": weight, "backend": backend}
        return fastvae.elbo_loss(**given, beta=beta, reduction=reduction)

    def plain(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(plain_latent(*tensors[count:]), drawn.exact(*tensors[:count]), strict=True)
        w = 1.0 if weight is None else weight.double()
        (kl, ll), (kl_size, ll_size) = parts
        mean = [t.mean(0) if t.dim() == 2 else t for t in (ll, ll_size)]
        loss, size = w * (beta * kl - mean[0]), w * (beta * kl_size + mean[1])
        if reduction == "none":
            return loss, size
        scale = max(batch, 1) if reduction == "mean" else 1
        return loss.sum() / scale, size.sum() / scale

    result = torch.promote_types(value_dtype(dtype), value_dtype(latent_dtype))
    compare(draw, ours, plain, [*drawn.inputs, *extra], result)


# --- generated mistakes: an error or the answer ---


def draw_mistake(draw: Draw, shape: Sequence[int]) -> list[int]:
    """This shape four times in five, else one that is near it."""
    kind = draw(st.sampled_from(["same"] * 8 + ["head", "tail", "more", "one", "other", "none"]))
    shape = list(shape)
    if kind == "same" or (kind != "none" and not shape):
        return shape
    at = draw(st.integers(0, len(shape) - 1)) if shape else 0
    mistakes: dict[str, list[int]] = {
        "head": shape[1:],
        "tail": shape[:-1],
        "more": [*shape[:at], draw(SIZES), *shape[at:]],
        "one": [*shape[:at], 1, *shape[at + 1 :]],
        "other": [*shape[:at], draw(SIZES), *shape[at + 1 :]],
        "none": [],
    }
    return mistakes[kind]


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)


def answer_or_error(valid: bool, call: Callable[[], Tensor], exact: Callable[[], Tensor]) -> None:
    try:
        got = call()
    except EITHER as error:
        assert not valid, f"a good call was refused: {error}"  # noqa: PT017
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        assert valid, f"a bad call was accepted; it gave {got.dtype} {list(got.shape)}"
        torch.testing.assert_close(got.double(), exact().double(), rtol=1e-4, atol=1e-3)


def draw_plain(draw: Draw, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> Tensor:
    wrong = [torch.int64, torch.int16, torch.complex64, torch.bool, torch.uint8]
    dtype = draw(st.sampled_from([dtypes[0]] * 12 + [*dtypes, *wrong]))
    return torch.rand(shape, dtype=torch.float64).to(dtype)


@backends
@generated
@given(data=st.data())
def test_generated_mistakes_in_latents(data: Any, backend: str) -> None:
    draw, backend = data.draw, require(backend)
    shape = draw_shape(draw, 300)
    tensors = [draw_plain(draw, draw_mistake(draw, shape), FLOATS[1:2]) for _ in range(2)]
    prior: Any = None
    valid = tensors[0].shape == tensors[1].shape and tensors[0].dim() > 0
    if draw(st.booleans()):
        sizes = [draw_mistake(draw, draw_broadcast(draw, shape)) for _ in range(2)]
        prior = tuple(draw_plain(draw, s, FLOATS[1:2]) for s in sizes)
        valid = valid and all(broadcasts(p.shape, tensors[0].shape) for p in prior)
    everything = [*tensors, *(prior or ())]
    valid = valid and all(t.dtype == torch.float32 for t in everything)

    answer_or_error(
        valid,
        lambda: fastvae.kl_divergence(*tensors, prior=prior, backend=backend),
        lambda: plain_kl(*(t.double() for t in everything))[0],
    )


@backends
@generated
@given(data=st.data())
def test_generated_mistakes_in_a_loss(data: Any, backend: str) -> None:
    draw, backend = data.draw, require(backend)
    shape = draw_shape(draw, 300)
    x = draw_plain(draw, draw_mistake(draw, shape), [torch.float32, torch.uint8, torch.bool])
    lead = draw(st.sampled_from([[], [], [1], [3], [0]]))
    logits = draw_plain(draw, [*lead, *draw_mistake(draw, shape)], FLOATS[1:])
    kl = draw_plain(draw, draw_mistake(draw, shape[:1]), FLOATS[1:])
    mask = weight = None
    if draw(st.booleans()):
        mask_shape = draw_mistake(draw, draw_broadcast(draw, shape))
        mask = torch.rand(mask_shape) > 0.5 if draw(st.integers(0, 9)) else torch.rand(mask_shape)
    if draw(st.booleans()):
        weight = draw_plain(draw, draw_mistake(draw, shape[:1]), FLOATS[1:])
    same = logits.shape == x.shape
    with_samples = logits.dim() == x.dim() + 1 and logits.shape[1:] == x.shape
    valid = x.dim() > 0 and (same or (with_samples and logits.shape[0] > 0))
    valid = valid and x.dtype in (*FLOATS, torch.uint8, torch.bool)
    per_sample = [t for t in (kl, weight) if t is not None]
    valid = valid and all(t.dtype in FLOATS for t in (logits, *per_sample))
    valid = valid and all(t.shape == x.shape[:1] for t in per_sample)
    if mask is not None:
        valid = valid and mask.dtype == torch.bool and broadcasts(mask.shape, x.shape)

    def exact() -> Tensor:
        terms = plain_bernoulli(x.double(), logits.double())
        terms = terms if mask is None else torch.where(mask, terms, 0)
        ll = sum_event(terms, x.dim() - 1)
        loss = kl.double() - (ll.mean(0) if ll.dim() == 2 else ll)
        return loss if weight is None else loss * weight.double()

    given: dict[str, Any] = {"kl": kl, "mask": mask, "sample_weight": weight, "reduction": "none"}
    answer_or_error(valid, lambda: fastvae.elbo_loss(logits, x, **given, backend=backend), exact)
