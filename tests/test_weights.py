"""sample_weight and β as tensors with gradients; β = 0; the module's β."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae import ELBOLoss, reference

B, D, L = 6, 9, 4
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def tensors(num_samples: int | None = None, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    lead = () if num_samples is None else (num_samples,)
    return {
        "recon": torch.randn(*lead, B, D, dtype=dtype).requires_grad_(),
        "x": torch.rand(B, D, dtype=dtype),
        "mu": torch.randn(B, L, dtype=dtype).requires_grad_(),
        "logvar": torch.randn(B, L, dtype=dtype).requires_grad_(),
        "sample_weight": torch.rand(B, dtype=dtype).requires_grad_(),
        "beta": torch.tensor(0.7, dtype=dtype).requires_grad_(),
    }


def by_hand(
    recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, sample_weight: Any, beta: Any, how: str
) -> Tensor:
    """The loss as a formula, weights and β inside the graph."""
    rows = reference.log_likelihood(x, recon, "bernoulli")
    ll = rows.mean(0) if rows.dim() == 2 else rows
    loss = sample_weight * (beta * reference.kl_divergence(mu, logvar) - ll)
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[how]()


def compare(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(got, want)
    upstream = torch.linspace(0.5, 2, got.numel(), dtype=got.dtype).view(got.shape).to(got.device)
    ours, exact = (torch.autograd.grad(t, inputs, upstream.to(t.dtype)) for t in (got, want))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)


@reductions
@pytest.mark.parametrize("num_samples", [None, 3])
def test_gradients_of_weight_and_beta(
    reduction: str, num_samples: int | None, backend: str
) -> None:
    given = tensors(num_samples)
    leaves = [t for t in given.values() if t.requires_grad]
    loss = fastvae.elbo_loss(**given, reduction=reduction, backend=backend)
    compare(loss, by_hand(**given, how=reduction), leaves)


@reductions
def test_only_the_weight_asks(reduction: str, backend: str) -> None:
    """Attention weights over a frozen model: nothing else has a graph."""
    given = {k: t.detach() for k, t in tensors().items()}
    given["sample_weight"].requires_grad_()
    loss = fastvae.elbo_loss(**given, reduction=reduction, backend=backend)
    compare(loss, by_hand(**given, how=reduction), [given["sample_weight"]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_the_weight(dtype: torch.dtype, backend: str) -> None:
    given = tensors(dtype=torch.float32)
    given["sample_weight"] = given["sample_weight"].detach().to(dtype).requires_grad_()
    loss = fastvae.elbo_loss(**given, backend=backend)
    (grad,) = torch.autograd.grad(loss, given["sample_weight"])
    (want,) = torch.autograd.grad(by_hand(**given, how="mean"), given["sample_weight"])
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_an_inplace_reconstruction_and_a_weight() -> None:
    given = tensors()
    plain = torch.autograd.grad(fastvae.elbo_loss(**given), given["sample_weight"])[0]
    given["recon"] = given["recon"] * 1
    loss = fastvae.elbo_loss(**given, inplace_backward=True)
    assert torch.equal(torch.autograd.grad(loss, given["sample_weight"])[0], plain)


@pytest.mark.parametrize("how", ["double", "func", "jvp", "compiled"])
def test_other_ways_to_differentiate(how: str) -> None:
    given = tensors()
    names = [name for name, t in given.items() if t.requires_grad]

    def ours(*leaves: Tensor) -> Tensor:
        return fastvae.elbo_loss(**{**given, **dict(zip(names, leaves, strict=True))})

    def exact(*leaves: Tensor) -> Tensor:
        return by_hand(**{**given, **dict(zip(names, leaves, strict=True))}, how="mean")

    leaves = tuple(given[name].detach().requires_grad_() for name in names)
    every = tuple(range(len(leaves)))
    if how == "double":
        assert torch.autograd.gradgradcheck(ours, leaves)
        return
    if how == "func":
        got, want = (torch.func.grad(f, every)(*leaves) for f in (ours, exact))
    elif how == "jvp":
        tangents = tuple(torch.ones_like(t) for t in leaves)
        got, want = (torch.func.jvp(f, leaves, tangents) for f in (ours, exact))
    else:
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        got, want = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, exact))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_terms_of_a_weighted_loss_have_no_graph(backend: str) -> None:
    given = tensors()
    terms = fastvae.elbo_terms(**given, backend=backend)
    assert terms.loss.requires_grad
    assert not terms.log_likelihood.requires_grad and not terms.kl.requires_grad
    torch.testing.assert_close(terms.loss, given["beta"] * terms.kl - terms.log_likelihood)


# ------------------------------------------------------------------------------------------- beta


@reductions
def test_beta_zero_leaves_an_infinite_kl_out(reduction: str, backend: str) -> None:
    """As at the start of an annealing schedule, where nothing keeps logvar finite yet."""
    given = tensors(dtype=torch.float32)
    given["logvar"] = torch.full((B, L), 200.0).requires_grad_()
    given["beta"] = 0.0
    loss = fastvae.elbo_loss(**given, reduction=reduction, backend=backend)
    rows = -given["sample_weight"] * fastvae.log_likelihood(given["recon"], given["x"])
    want = {"mean": rows.mean, "sum": rows.sum, "none": lambda: rows}[reduction]()
    torch.testing.assert_close(loss, want)
    grads = torch.autograd.grad(
        loss.sum(), [given[n] for n in ("recon", "mu", "logvar")], allow_unused=True
    )
    assert grads[0].isfinite().all()
    assert all(g is None or not g.any() for g in grads[1:])


@pytest.mark.parametrize("backend", ["cpp", "eager"])
@pytest.mark.parametrize("route", ["compiled", "grad", "tensor", "learned"])
def test_beta_zero_on_every_route(route: str, backend: str) -> None:
    given = {k: t.detach() for k, t in tensors(dtype=torch.float32).items()}
    given["logvar"][2:] = 200.0
    given["beta"] = torch.tensor(0.0) if route in ("tensor", "learned") else 0.0
    recon, logvar = given.pop("recon"), given.pop("logvar")

    def loss(recon: Tensor, logvar: Tensor) -> Tensor:
        return fastvae.elbo_loss(recon, logvar=logvar, backend=backend, **given)

    want = -(given["sample_weight"] * fastvae.log_likelihood(recon, given["x"])).mean()
    torch.testing.assert_close(loss(recon, logvar), want)
    if route == "grad":
        grads = torch.func.grad(loss, (0, 1))(recon, logvar)
        assert grads[0].isfinite().all() and not grads[1].any()
    elif route == "compiled":
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(recon, logvar), want)
    elif route == "learned":
        beta = given["beta"].requires_grad_()
        (grad,) = torch.autograd.grad(loss(recon, logvar), beta)
        assert grad.isfinite()  # of the rows whose KL is


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_beta_is_the_number(shape: tuple[int, ...], backend: str) -> None:
    given = tensors()
    del given["beta"]
    beta = torch.full(shape, 0.3, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "backend": backend}
        got = fastvae.elbo_terms(**given, beta=beta, **options)
        want = fastvae.elbo_terms(**given, beta=0.3, **options)
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.int64(2), 3, 0.25])
def test_the_modules_beta_converts(value: Any) -> None:
    criterion = ELBOLoss(beta=value)
    assert type(criterion.beta) is float and criterion.beta == float(value)
    criterion.beta = 1
    assert type(criterion.beta) is float
    given = tensors()
    del given["beta"]
    criterion.beta = value
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), criterion(**given))


@pytest.mark.parametrize("value", [-1.0, float("nan"), "1", None, torch.zeros(2), torch.tensor(1)])
def test_the_modules_beta_refuses_at_assignment(value: Any) -> None:
    criterion = ELBOLoss(beta=0.5)
    with pytest.raises((TypeError, ValueError), match="beta"):
        criterion.beta = value
    assert criterion.beta == 0.5


def test_a_modules_tensor_beta_moves_with_it_and_learns() -> None:
    criterion = ELBOLoss(beta=torch.tensor(0.5))
    assert isinstance(criterion.beta, Tensor) and criterion.double().beta.dtype == torch.float64
    assert list(criterion.state_dict()) == ["beta"] and "beta=tensor" in repr(criterion)
    criterion.beta = nn.Parameter(torch.tensor(0.5))
    assert [name for name, _ in criterion.named_parameters()] == ["beta"]
    given = tensors()
    del given["beta"]
    criterion(**given).backward()
    want = reference.kl_divergence(given["mu"], given["logvar"]) * given["sample_weight"]
    torch.testing.assert_close(criterion.beta.grad, want.mean().detach().float())
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert isinstance(twin.beta, nn.Parameter) and twin.beta is not criterion.beta
    criterion.beta = 0.25
    assert criterion.beta == 0.25 and not list(criterion.parameters())


def test_beta_from_a_schedule_compiles_once() -> None:
    torch._dynamo.reset()
    given = tensors()
    criterion, graphs = ELBOLoss(), []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(criterion, fullgraph=True, backend=count)
    del given["beta"]
    for step in range(5):
        criterion.beta = torch.tensor(0.1 * step, dtype=torch.float64)
        torch.testing.assert_close(compiled(**given), criterion(**given))
    assert len(graphs) == 1
