"""The calls that go past torch.ops (`csrc/python.cpp`): the same results, and out of the way where
something has to see the operator."""

from collections.abc import Callable

import pytest
import torch
from conftest import require
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastvae
from fastvae._backends import cpp


@pytest.fixture(autouse=True)
def extension() -> None:
    require("cpp")


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, logits, mu, logvar"""
    x, logits = torch.rand(3, 4), torch.randn(3, 4, requires_grad=True)
    mu, logvar = (torch.randn(3, 2, requires_grad=True) for _ in range(2))
    return x, logits, mu, logvar


def elbo(x: object, logits: object, kl: object) -> object:
    return cpp.direct.elbo(x, logits, kl, "bernoulli", (), 1.0, "mean")


@pytest.mark.parametrize("offset", [0, 5])
def test_direct_calls_equal_the_operators(offset: int) -> None:
    x, logits, mu, logvar = tensors()

    def run(backend: str) -> list[Tensor]:
        torch.manual_seed(1)
        first = fastvae.rsample(mu, logvar, sample_offset=offset, backend=backend)
        z, kl = fastvae.rsample_kl(mu, logvar, sample_offset=offset, backend=backend)
        terms = fastvae.elbo_terms(logits, x, kl=kl, beta=0.5, backend=backend)
        total = terms.loss + (first * z).sum()
        return [first, z, kl, *terms, *torch.autograd.grad(total, [logits, mu, logvar])]

    torch.testing.assert_close(run("auto"), run("cpp"), rtol=0, atol=0)
    torch.manual_seed(1)
    sample = cpp.direct.rsample(mu, logvar, offset)  # it did serve
    torch.testing.assert_close(run("cpp")[0], sample, rtol=0, atol=0)
    assert elbo(x, logits, mu.sum(1)) is not None


@pytest.mark.parametrize("offset", [-1, 2**62, 2**63 - 1])
def test_a_refused_call_does_not_move_the_generator(offset: int) -> None:
    mu, logvar = tensors()[2:]
    before = torch.get_rng_state()
    for function in (fastvae.rsample, fastvae.rsample_kl):
        with pytest.raises(ValueError, match="sample_offset"):
            function(mu, logvar, sample_offset=offset)
    assert torch.get_rng_state().equal(before)


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    "bad",
    [None, 3, torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2).to_sparse(), torch.zeros(2),
     torch.zeros(()), torch.zeros(3, 2, device="meta"), torch.zeros(3, 2).as_subclass(Subclass)],
    ids=lambda t: "sparse" if isinstance(t, Tensor) and t.is_sparse else None,
)  # fmt: skip
def test_they_leave_the_uncommon_to_the_checks(bad: object) -> None:
    x, logits, mu, logvar = tensors()
    kl = mu.sum(1)
    assert cpp.direct.rsample(mu, bad, 0) is None
    assert cpp.direct.rsample_kl(bad, logvar, 0) is None
    assert elbo(x, bad, kl) is None
    assert elbo(bad, logits, kl) is None
    assert elbo(x, logits, bad) is None


@pytest.mark.parametrize("offset", [-1, 2**63, 2**63 - 2, 1.0, True, None])
def test_they_leave_strange_offsets_to_the_checks(offset: object) -> None:
    _, _, mu, logvar = tensors()
    assert cpp.direct.rsample(mu, logvar, offset) is None
    assert cpp.direct.rsample_kl(mu, logvar, offset) is None


class Recorder:
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def record(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(Recorder, TorchFunctionMode):
    __torch_function__ = Recorder.record


class Operators(Recorder, TorchDispatchMode):
    __torch_dispatch__ = Recorder.record


@pytest.mark.parametrize("mode", [Functions, Operators])
def test_modes_see_the_operators(mode: type[Functions | Operators]) -> None:
    x, logits, mu, logvar = tensors()
    with mode() as active:
        _, kl = fastvae.rsample_kl(mu, logvar)
        fastvae.rsample(mu, logvar)
        fastvae.elbo_loss(logits, x, kl=kl)
    for name in ("rsample_kl", "rsample", "elbo"):
        assert any(seen.startswith(f"fastvae.{name}") for seen in active.seen), active.seen


def test_transforms_take_the_long_way() -> None:
    x, logits, mu, logvar = tensors()
    seen: list[object] = []

    def f(m: Tensor, lv: Tensor) -> Tensor:
        seen.extend((cpp.direct.rsample_kl(m, lv, 0), elbo(x, logits.detach(), m.sum(1))))
        return m.sum()

    torch.func.grad(f)(mu.detach(), logvar.detach())
    torch.vmap(f)(mu.detach()[None], logvar.detach()[None])
    assert seen == [None] * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_error_of_a_saved_tensor_hook_passes_through(reentrant: bool) -> None:
    """Checkpointing ends its recomputation by one, and counts how often the hook was called."""
    x, logits, mu, logvar = tensors()

    def block(m: Tensor, lv: Tensor, logits: Tensor) -> Tensor:
        _, kl = fastvae.rsample_kl(m, lv)
        return fastvae.elbo_loss(logits * 2, x, kl=kl)

    def gradients(run: Callable[..., Tensor]) -> list[Tensor | None]:
        torch.manual_seed(2)
        leaves = [t.detach().requires_grad_() for t in (mu, logvar, logits)]
        run(*leaves).backward()
        return [t.grad for t in leaves]

    expected = gradients(block)
    found = gradients(lambda *t: checkpoint(block, *t, use_reentrant=reentrant))
    assert None not in found
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def refuse(t: Tensor) -> Tensor:
        raise KeyError("the hook's own")

    hooks = torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t)
    with hooks, pytest.raises(KeyError, match="the hook's own"):
        block(mu, logvar, logits)


def test_a_named_likelihood_is_made_once_and_not_shared_with_modules() -> None:
    x, logits, _, _ = tensors()
    one, two = fastvae.ELBOLoss("gaussian"), fastvae.ELBOLoss("gaussian")
    assert one.likelihood is not two.likelihood
    kl = torch.zeros(3)
    expected = fastvae.elbo_loss(logits, x, kl=kl, likelihood=fastvae.likelihoods.Gaussian())
    assert fastvae.elbo_loss(logits, x, kl=kl, likelihood="gaussian").equal(expected)
