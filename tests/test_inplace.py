"""inplace_backward=True: the same gradients, in the reconstruction's own memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae.likelihoods import Gaussian

pytestmark = pytest.mark.skipif(
    not fastvae.backends()["cpp"].available, reason="the eager backend ignores the option"
)


def inputs(dtype: torch.dtype = torch.float32, rows: int = 6, columns: int = 37) -> list[Tensor]:
    torch.manual_seed(0)
    x, weight = torch.rand(rows, columns, dtype=dtype), torch.randn(rows, columns, dtype=dtype)
    return [x, weight.requires_grad_(), torch.rand(rows).requires_grad_()]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_same_loss_and_gradients(dtype: torch.dtype, reduction: str, backend: str) -> None:
    x, leaf, kl = inputs(dtype)
    got = []
    for inplace in (False, True):
        recon = leaf * 2
        loss = fastvae.elbo_loss(
            recon, x, kl=kl, reduction=reduction, inplace_backward=inplace, backend=backend
        )
        upstream = torch.linspace(1, 2, loss.numel()).view(loss.shape)
        got.append((loss, *torch.autograd.grad(loss, (leaf, kl), upstream)))
    for plain, overwritten in zip(*got, strict=True):
        assert torch.equal(plain, overwritten)


def test_two_parameters_and_samples() -> None:
    x, leaf, kl = inputs()
    got = []
    for inplace in (False, True):
        criterion = fastvae.ELBOLoss("gaussian_logvar", inplace_backward=inplace)
        mean, logvar = torch.stack((leaf, leaf)) * 1.5, torch.stack((leaf, leaf)) * 0.1
        got.append(torch.autograd.grad(criterion((mean, logvar), x, kl=kl), leaf)[0])
    assert torch.equal(*got)


def test_learned_scale_keeps_its_own_gradient() -> None:
    x, leaf, kl = inputs()
    criterion = fastvae.ELBOLoss(Gaussian(logvar="learned"), inplace_backward=True)
    before = [p.detach().clone() for p in criterion.parameters()]
    criterion(leaf * 2, x, kl=kl).backward()
    assert all(torch.equal(p, b) for p, b in zip(criterion.parameters(), before, strict=True))
    assert all(p.grad is not None for p in criterion.parameters())


def test_the_gradient_lies_in_the_reconstruction(backend: str) -> None:
    x, leaf, kl = inputs()
    recon = leaf * 2
    before = recon.detach().clone()
    fastvae.elbo_loss(recon, x, kl=kl, inplace_backward=True, backend=backend)
    if backend == "eager":  # autograd keeps what it keeps
        assert torch.equal(recon, before)
        return
    expected = (torch.sigmoid(leaf * 2) - x) / len(x)
    torch.testing.assert_close(recon, expected)


@pytest.mark.parametrize("where", ["no_grad", "detached"])
def test_nothing_is_overwritten_without_gradients(where: str) -> None:
    x, leaf, kl = inputs()
    recon = leaf.detach() * 2 if where == "detached" else leaf * 2
    before = recon.detach().clone()
    with torch.set_grad_enabled(where != "no_grad"):
        fastvae.elbo_loss(recon, x, kl=kl, inplace_backward=True)
    assert torch.equal(recon, before)


def test_no_memory_of_the_reconstructions_size() -> None:
    x, leaf, kl = inputs(rows=64, columns=4096)
    recon = leaf * 1.0
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = fastvae.elbo_loss(recon, x, kl=kl, inplace_backward=True)
        torch.autograd.grad(loss, recon)
    largest = max(e.self_device_memory_usage or e.self_cpu_memory_usage for e in profile.events())
    assert largest < recon.nbytes / 16


def leaf_itself(x: Tensor, leaf: Tensor, kl: Tensor) -> Tensor:
    return leaf


def view_of_leaf(x: Tensor, leaf: Tensor, kl: Tensor) -> Tensor:
    return leaf.view(leaf.shape)


def transposed(x: Tensor, leaf: Tensor, kl: Tensor) -> Tensor:
    return (leaf * 2).t().contiguous().t()


@pytest.mark.parametrize(
    ("make", "message"),
    [(leaf_itself, "leaf"), (view_of_leaf, "leaf"), (transposed, "not contiguous")],
)
def test_refused_before_anything_is_written(
    make: Callable[[Tensor, Tensor, Tensor], Tensor], message: str
) -> None:
    x, leaf, kl = inputs()
    recon = make(x, leaf, kl)
    before = recon.detach().clone()
    with pytest.raises(ValueError, match=message):
        fastvae.elbo_loss(recon, x, kl=kl, inplace_backward=True)
    assert torch.equal(recon, before)


def test_gradients_do_not_come_in_another_parameters_layout() -> None:
    """The mean, which needs none, lies in another order than what would be overwritten."""
    x, mean, leaf = (torch.randn(2, 3, 4, 5) for _ in range(3))
    mean = mean.to(memory_format=torch.channels_last)
    kl, grads = torch.zeros(2), []
    for inplace in (True, False):
        logvar = leaf.clone().requires_grad_()
        recon = mean, logvar * 1
        loss = fastvae.elbo_loss(
            recon, x, kl=kl, likelihood="gaussian_logvar", inplace_backward=inplace
        )
        grads += torch.autograd.grad(loss, logvar)
    torch.testing.assert_close(*grads)


def hooked(t: Tensor) -> Tensor:
    decoder = nn.Identity()
    decoder.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    return decoder(t)


@pytest.mark.parametrize("make", [hooked, lambda t: t.split(6)[0], lambda t: t[None].unbind()[0]])
def test_views_that_nobody_may_modify_are_named(make: Callable[[Tensor], Tensor]) -> None:
    x, leaf, kl = inputs()
    recon = make(leaf * 2)
    before = recon.detach().clone()
    with pytest.raises(ValueError, match=r"split, unbind.*full backward hook.*leave inplace_back"):
        fastvae.elbo_loss(recon, x, kl=kl, inplace_backward=True)
    assert torch.equal(recon, before)
    fastvae.elbo_loss(recon, x, kl=kl).backward()


def test_shared_memory_is_refused() -> None:
    _, leaf, kl = inputs()
    recon = torch.sigmoid(leaf)
    with pytest.raises(ValueError, match="shares memory"):
        fastvae.elbo_loss(recon, recon.detach(), kl=kl, inplace_backward=True)


def test_a_decoder_that_saved_its_output_is_told() -> None:
    x, leaf, kl = inputs()
    criterion = fastvae.ELBOLoss("bernoulli_probs", inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        criterion(torch.sigmoid(leaf), x, kl=kl).backward()


def test_writing_to_the_reconstruction_afterwards_is_noticed() -> None:
    x, leaf, kl = inputs()
    recon = leaf * 2
    loss = fastvae.elbo_loss(recon, x, kl=kl, inplace_backward=True)
    recon.data.add_(0)  # no version: not noticed, as everywhere in autograd
    recon.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_second_derivative() -> None:
    x, leaf, kl = inputs()
    loss = fastvae.elbo_loss(leaf * 2, x, kl=kl, inplace_backward=True)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_backward_twice() -> None:
    x, leaf, kl = inputs()
    loss = 3 * fastvae.elbo_loss(leaf * 2, x, kl=kl, inplace_backward=True)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, leaf)[0])


def test_probability_outside_its_domain() -> None:
    x, leaf, kl = inputs()
    for value in (1.5, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"probs must lie in \[0, 1\]"):
            fastvae.elbo_loss(
                torch.full_like(x, value) + 0 * leaf, x, kl=kl,
                likelihood="bernoulli_probs", inplace_backward=True,
            )  # fmt: skip


def test_ignored_under_compile_and_func() -> None:
    x, leaf, kl = inputs()

    def loss(leaf: Tensor, inplace: bool) -> Tensor:
        return fastvae.elbo_loss(leaf * 2, x, kl=kl.detach(), inplace_backward=inplace)

    (expected,) = torch.autograd.grad(loss(leaf, False), leaf)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf, True), leaf)[0], expected)
    functional = torch.func.grad(loss)(leaf.detach(), True)
    torch.testing.assert_close(functional, expected)
