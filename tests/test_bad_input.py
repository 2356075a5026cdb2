"""Bad input to the public functions and modules: a one-line error that names the argument."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from bad import (
    EITHER,
    INF,
    LATENTS,
    MU,
    NAN,
    TORCHS,
    Bad,
    T,
    V,
    X,
    backends,
    bad,
    bool_,
    c64,
    f64,
    full,
    i64,
    meta,
    odd,
    rejects,
    shapes,
    table,
    u8,
)
from conftest import require
from torch import Tensor

import fastvae
from fastvae import DiagonalNormal, likelihoods
from fastvae.likelihoods import Bernoulli, BernoulliProbs, Gaussian, Likelihood


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
    bad(V, r"mu.*\[\]: mu\[None\] is a batch of one", mu=full(), logvar=full()),
    bad(T, r"mu.*DiagonalNormal: pass q\.mu and q\.logvar", mu=DiagonalNormal(MU, MU)),
    bad(V, "exactly one of logvar, std and log_std, got logvar and std", std=MU + 1),
    bad(V, "exactly one of logvar, std and log_std, got none", logvar=None),
    bad(T, r"mu.*Normal: q = fastvae\.from_distribution", mu=torch.distributions.Normal(MU, MU)),
    bad(T, r"mu.*tuple: pass mu and logvar", mu=(MU, MU)),
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
    *(bad(V, f"seed.*{k}", seed=k) for k in (-1, 2**63)),
    bad(V, r"seed.*one element.*\[2\]", seed=i64(2)),
    *(bad(T, f"seed.*{k}", seed=v) for k, v in (("float", 0.5), ("bool", True), ("str", "7"))),
    bad(T, "seed.*int64.*float32", seed=full(1)),
    bad(V, "seed.*cpu.*meta", seed=i64(1).to("meta")),
    bad(V, "either generator or seed", seed=7, generator=torch.Generator()),
    *(bad(V, r"sample_index.*\[4\]", sample_index=i64(*s)) for s in ((3,), (), (4, 1), (1,))),
    bad(T, "sample_index.*int", sample_index=3),
    bad(T, "sample_index.*list", sample_index=[0, 1, 2, 3]),
    bad(T, "sample_index.*int64.*float32", sample_index=full(4)),
    bad(T, "sample_index.*int64.*int32", sample_index=i64(4).int()),
    bad(V, "sample_index.*cpu.*meta", sample_index=i64(4).to("meta")),
    bad(V, "sample_index.*-3.*row 2", sample_index=torch.tensor([0, 5, -3, 1])),
    bad(V, "sample_index.*below.*row 3", sample_index=torch.tensor([0, 5, 3, 2**61])),
    bad(V, "sample_index.*below.*row 0", sample_index=i64(4) + 2**58, num_samples=8),
    bad(V, "either sample_offset or sample_index", sample_index=i64(4), sample_offset=2),
    bad(T, "generator.*int", generator=0),
    bad(T, "generator.*str", generator="cpu"),
    bad(T, "generator.*module", generator=torch),
]
PRIOR = [
    *(bad(T, r"prior.*got", prior=p) for p in (0.0, "ab", {"a": MU}, MU, (), (MU,), (MU,) * 3)),
    bad(T, r"prior.*got", prior=((MU, MU),)),
    bad(T, r"prior.*tuple", prior=((MU, MU), MU)),
    bad(T, r"prior.*NoneType", prior=(None, MU)),
    bad(T, r"prior.*pair.*numbers.*, got float", prior=0.0),
    bad(T, r"prior.*str", prior=("0", 0.0)),
    bad(T, r"prior.*bool", prior=(False, 0.0)),
    *(bad(V, rf"prior logvar.*finite.*{v}", prior=(0.0, v)) for v in (NAN, INF, -INF)),
    bad(V, r"prior mu.*finite torch\.float32.*1e\+39", prior=(1e39, 0.0)),
    bad(T, r"prior.*got Laplace", prior=torch.distributions.Laplace(MU, MU + 1)),
    bad(V, r"prior mu.*\[4, 6\].*\[3, 6\]", prior=DiagonalNormal(full(3, 6), full(3, 6))),
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
    bad(V, r"x\b.*0, 1.*2(\.0)?\]: for pixel values divide by 255",
        x=torch.full((4, 5), 2, dtype=torch.uint8)),
    bad(V, r"x\b.*0, 1.*255(\.0)?\]: for pixel values divide by 255", x=full(4, 5, value=255.0)),
    bad(V, r"x\b.*0, 1.*256(\.0)?\]$", x=full(4, 5, value=256.0)),
    bad(V, r"x\b.*0, 1.*: for data in \[-1, 1\] take \(x \+ 1\) / 2", x=full(4, 5, value=-0.5)),
    bad(V, r"x\b.*0, 1.*1\.0000001.*\]: rounding\? clamp\(0, 1\)", x=full(4, 5, value=1.0000001)),
    bad(V, r"x\b.*0, 1.*1\.0000", x=f64(4, 5, value=1 + 1e-9), recon=f64(4, 5)),
    bad(T, r"x\b.*int64: take x\.float\(\), of pixel values x / 255", x=i64(4, 5)),
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
          likelihood=n) for n in ("student_t", "", "Bernoulli", "bernoulli ")),
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
    bad(T, r"mu.*tuple: pass mu and logvar", mu=(MU, MU), logvar=None),
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
      for b in ("1", None, True, [1.0], 1j)),
    bad(V, r"beta.*one element.*\[2\]", beta=full(2)),
    bad(T, r"beta.*int64", beta=torch.tensor(1)),
    *(bad(V, rf"beta.*{v}", beta=full(value=v)) for v in (-0.5, NAN, INF)),
    *(bad(V, r"reduction.*mean.*sum.*none.*" + re.escape(repr(r)), reduction=r)
      for r in ("avg", "", "MEAN", None, 0, ["mean"])),
]
BACKEND = [
    *(bad(V, "backend.*auto.*cpp.*cuda.*triton.*eager.*" + re.escape(repr(b)), backend=b)
      for b in ("gpu", "", "CPP", None, 3, ["cpp"])),
    bad(V, "backend 'triton' .*CUDA tensors.* on cpu", backend="triton"),
    bad(V, "backend 'cuda' (is not available: .*nvcc|serves CUDA tensors)", backend="cuda"),
]
# fmt: on


@pytest.fixture(autouse=True)
def not_interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes CPU tensors only where its interpreter is asked for (tests/conftest.py)."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def through_module(terms: bool, **given: Any) -> Any:
    own = ("likelihood", "beta", "reduction", "backend")
    criterion = fastvae.ELBOLoss(**{k: given.pop(k) for k in own if k in given})
    return criterion.terms(**given) if terms else criterion(**given)


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


class Image(Tensor):
    """A subclass that sees calls and has values, as torchvision's."""


@backends
def test_a_subclass_is_checked_too(backend: str) -> None:
    x = full(4, 5, value=1.5).as_subclass(Image)
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\]"):
        fastvae.log_likelihood(X, x, backend=require(backend))


@pytest.mark.parametrize("scale", [np.float32(0.5), np.float64(0.5), np.int64(2), 2])
def test_numpys_numbers_are_numbers(scale: Any) -> None:
    assert Gaussian(scale=scale).scale == float(scale)
    assert BernoulliProbs(log_min=-scale).log_min == -float(scale)


MAKERS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (Gaussian, BernoulliProbs, fastvae.ELBOLoss, likelihoods.get)
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
        bad(V, "likelihood.*bernoulli.*student_t", likelihood="student_t"),
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
        got = fastvae.log_likelihood(mean, x, Gaussian(scale=scale), backend=require(backend))
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
