"""Bad input to torch.ops.fastvae itself: an error, never a crash."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bad import (
    LATENTS,
    MU,
    TORCHS,
    Bad,
    T,
    V,
    X,
    bad,
    bool_,
    c64,
    f64,
    full,
    i64,
    odd,
    ops,
    rejects,
    shapes,
    table,
)
from conftest import require
from torch import Tensor

import fastvae

SEED = torch.tensor([7])
Z = {"seed": SEED, "num_samples": None, "sample_offset": 0, "sample_index": None}
NO_PRIOR: dict[str, Any] = {"prior_mu": None, "prior_logvar": None}
FAMILY: dict[str, Any] = {"x": X, "params": [X], "family": "bernoulli", "options": [], "mask": None}
RAW_GOOD: dict[str, dict[str, Any]] = {
    "seed": {"like": X, "generator": None},
    "noise": {"seed": SEED, "size": [4, 6], "num_samples": 1, "sample_offset": 0,
              "sample_index": None},
    "rsample": {**LATENTS, **Z},
    "rsample_kl": {**LATENTS, **Z},
    "rsample_backward": {"grad_z": MU, "grad_kl": full(4), **LATENTS, **Z},
    "kl_divergence": {**LATENTS, **NO_PRIOR, "mask": None},
    "log_likelihood": FAMILY,
    "row_forward": {**FAMILY, "weight": full(4), "scale": 1.0, "needs": [True] * 5},
    "elbo": {**FAMILY, "kl": full(4), "weight": full(4), "beta": 1.0, "reduction": "mean"},
    "elbo_reduce": {
        "log_likelihood": full(2, 4), "kl": full(4), "weight": full(4), "beta": 1.0,
        "reduction": "sum",
    },
    "count_nonfinite": {
        "state": i64(5, 3), "rows": full(2, 4), "kl": full(4), "weight": full(4),
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
    *(
        bad(V, r"sample_index.*\[4\].*one per", sample_index=i64(*s))
        for s in ((3,), (), (4, 1), (0,))
    ),
    *(
        bad(T, f"sample_index.*{n}", sample_index=full(4).to(d))
        for d, n in ((torch.float32, "Float"), (torch.int32, "Int"), (torch.bool, "Bool"))
    ),
    bad(V, "sample_index.*-3 in row 1", sample_index=torch.tensor([0, -3, 1, 2])),
    bad(V, "sample_index.*below.*row 3", sample_index=torch.tensor([0, 1, 2, 2**62])),
    bad(V, "either sample_offset or sample_index", sample_index=i64(4), sample_offset=2),
    bad(RuntimeError, "'sample_index'", sample_index=[0, 1, 2, 3]),
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
          options=[0.0]) for s in ((4,), (5,), (2, 5), (3, 1), (2, 4, 5), (1, 1, 1))),
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
        bad(T, "mask.*bool.*Float", mask=full(4, 6)),
        bad(V, r"mask.*mu.*\[4, 1\]", mask=bool_(4, 1)),
    ],
    "log_likelihood": RAW_DATA,
    "row_forward": [
        *RAW_DATA,
        *RAW_WEIGHT,
        *(bad(RuntimeError, "size 5", needs=[True] * n) for n in (0, 4, 6)),
    ],
    "elbo": [*RAW_DATA, *RAW_LOSS],
    "elbo_reduce": [
        *RAW_LOSS,
        *shapes("log_likelihood", (3,), (2, 3), (1, 2, 4), (4, 1), ()),
        bad(T, "log_likelihood.*Long", log_likelihood=i64(4)),
    ],
    "count_nonfinite": [
        *(bad(V, r"state.*\[5, 3\]", state=i64(*s)) for s in ((3, 5), (5,), (), (5, 4))),
        bad(V, "state.*contiguous", state=i64(3, 5).T),
        bad(T, "state.*int64.*Float", state=full(5, 3)),
        *shapes("rows", (), (1, 2, 4)),
        bad(T, "rows.*Long", rows=i64(4)),
        *shapes("kl", (3,), (1,), (4, 1), ()),
        bad(T, "kl.*Long", kl=i64(4)),
        *RAW_WEIGHT,
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
