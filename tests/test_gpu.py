"""What only a CUDA device shows: graphs, streams, devices, synchronization, large tensors.

With one, other tests run there too: those with the `backend` fixture (values and gradients against
the reference) and those with `triton_device` (opcheck, the noise's bits, the vocabulary's errors).
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, FAMILIES, Family, upstream_like
from conftest import GPU
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastvae
from fastvae._backends import cpp
from fastvae.likelihoods import Gaussian, registry

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]

ops = torch.ops.fastvae
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def normal(*shape: int, device: str = "cuda") -> Tensor:
    """A leaf."""
    return torch.randn(*shape, device=device).requires_grad_()


def same(results: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(results, others, strict=True)):
        assert torch.equal(a, b), f"result {i}"


def make_step(batch: int = 8, latents: int = 16, pixels: int = 40) -> Callable[[], list[Tensor]]:
    """A training step without the optimizer: z, the loss and the gradients."""
    mu, logvar, weight = normal(batch, latents), normal(batch, latents), normal(latents, pixels)
    x = torch.rand(batch, pixels, device="cuda")

    def step() -> list[Tensor]:
        z, kl = fastvae.rsample_kl(mu, logvar)
        loss = fastvae.elbo_loss(z @ weight, x, kl=kl)
        grads = torch.autograd.grad(loss, (mu, logvar, weight))
        return [z.detach(), loss.detach(), *grads]

    return step


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


def test_common_calls_go_past_torch_ops() -> None:
    mu, logvar, logits = normal(8, 4), normal(8, 4), normal(8, 5)
    x = torch.rand(8, 5, device="cuda")

    def run(backend: str) -> list[Tensor]:
        torch.manual_seed(1)
        z, kl = fastvae.rsample_kl(mu, logvar, backend=backend)
        loss = fastvae.elbo_loss(logits, x, kl=kl, backend=backend)
        return [z, kl, loss, *torch.autograd.grad(loss + z.sum(), (mu, logvar, logits))]

    chosen = next(b for b in ("cuda", "triton") if fastvae.backends()[b].available)
    same(run("auto"), run(chosen))
    assert cpp.direct.rsample_kl(mu, logvar, 0) is not None
    kl = torch.zeros(8, device="cuda")
    assert cpp.direct.elbo(x, logits, kl, "bernoulli", (), 1.0, "mean") is not None


# ------------------------------------------------------------------------- graphs, streams, devices


def test_a_graph_draws_fresh_noise_at_each_replay() -> None:
    step = make_step()
    with side_stream():
        for _ in range(3):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append([t.clone() for t in captured])
    for a, b in itertools.combinations(replays, 2):
        assert not torch.isclose(a[0], b[0]).any()

    torch.manual_seed(9)
    graph.replay()
    replayed = [t.clone() for t in captured]
    torch.manual_seed(9)
    z, *rest = step()
    assert torch.equal(replayed[0], z)
    for a, b in zip(replayed[1:], rest, strict=True):
        torch.testing.assert_close(a, b)


def test_the_recipe_of_a_graphed_step_trains() -> None:
    """docs/gpu.md's, step by step as without a graph."""
    page = (Path(__file__).parents[1] / "docs/gpu.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    recipe: dict[str, Any] = {}
    exec(code, recipe)
    x = torch.rand(32, 40, device="cuda").round()

    class VAE(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = torch.nn.Linear(40, 16), torch.nn.Linear(8, 40)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z, kl = fastvae.rsample_kl(*self.encoder(x).chunk(2, 1))
            return self.decoder(z), kl

    torch.manual_seed(0)
    model = VAE().cuda()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, capturable=True)
    replay = recipe["graphed"](model, fastvae.ELBOLoss(), optimizer, x)
    losses = [float(replay(x)) for _ in range(200)]
    assert len(set(losses)) == len(losses)  # fresh noise
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_same_noise_again(reentrant: bool) -> None:
    leaves = [normal(5, 33), normal(5, 33)]

    def block(mu: Tensor, logvar: Tensor) -> Tensor:
        z, kl = fastvae.rsample_kl(mu, logvar, num_samples=2)
        return z.square().sum() + kl.sum()

    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        run(*leaves).backward()
        torch.rand(7, device="cuda")
        grads = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return grads

    plain = gradients(block)
    same(gradients(lambda *t: checkpoint(block, *t, use_reentrant=reentrant)), plain)


def test_a_second_stream_gives_the_same() -> None:
    step = make_step()
    torch.manual_seed(4)
    expected = step()
    torch.manual_seed(4)
    with side_stream():
        got = step()
    torch.cuda.synchronize()
    assert torch.equal(got[0], expected[0])
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    inputs = [torch.randn(5, 33), torch.randn(5, 33), torch.rand(5, 33), torch.tensor([7])]

    def run(device: str) -> list[Tensor]:
        mu, logvar, x, seed = (t.to(device) for t in inputs)
        leaves = [mu.requires_grad_(), logvar.requires_grad_()]
        z, kl = ops.rsample_kl(*leaves, seed)
        loss = fastvae.elbo_loss(z, x, kl=kl)
        results = [z.detach(), loss.detach(), *torch.autograd.grad(loss, leaves)]
        assert all(t.device == torch.device(device) for t in results)
        return [t.cpu() for t in results]

    assert torch.cuda.current_device() == 0
    same(run("cuda:1"), run("cuda:0"))
    assert fastvae.rsample(inputs[0].to("cuda:1"), inputs[1].to("cuda:1")).isfinite().all()
    assert torch.cuda.current_device() == 0


# ---------------------------------------------------------------------------------- synchronization


def losses(name: str) -> dict[str, Callable[[], Tensor]]:
    """A scalar through each public function, with every argument that it has."""
    mu, logvar, prior = normal(6, 5), normal(6, 5), (normal(5), normal(6, 1))
    likelihood = registry[name]()
    x, given = likelihood.sample_inputs((6, 3, 7))
    recon = tuple(t.cuda().requires_grad_() for t in given)
    x, mask = x.cuda(), torch.rand(3, 7, device="cuda") < 0.7
    learned = Gaussian(logvar="learned").cuda()
    criterion = fastvae.ELBOLoss(likelihood, beta=0.5, reduction="sum")
    weight = torch.rand(6, device="cuda")
    return {
        "rsample": lambda: fastvae.rsample(mu, logvar, num_samples=3).sum(),
        "rsample_kl": lambda: sum(t.sum() for t in fastvae.rsample_kl(mu, logvar)),
        "kl_divergence": lambda: fastvae.kl_divergence(mu, logvar).sum(),
        "prior": lambda: fastvae.kl_divergence(mu, logvar, prior=prior).sum(),
        "log_likelihood": lambda: fastvae.log_likelihood(recon, x, likelihood, mask=mask).sum(),
        "learned": lambda: fastvae.log_likelihood(recon[0], x, learned).sum(),
        "elbo_loss": lambda: fastvae.elbo_loss(
            recon, x, mu, logvar, likelihood=likelihood, prior=prior, sample_weight=weight
        ),
        "ELBOLoss": lambda: 3 * criterion(recon, x, mu, logvar, mask=mask),
        "terms": lambda: criterion.terms(recon, x, mu, logvar).loss,
    }


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", registry)
def test_no_host_waits_for_the_device(name: str) -> None:
    for what, loss in losses(name).items():
        loss().backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss().backward()
        except RuntimeError as error:
            raise AssertionError(f"{what} synchronizes") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --------------------------------------------------------------------------- determinism, agreement


@pytest.mark.parametrize("shape", [(5, 33), (300, 784), (4, 1_000_000)], ids=str)
def test_two_runs_give_the_same_bits(shape: tuple[int, ...]) -> None:
    leaves = [normal(*shape) for _ in range(3)]
    scale = normal(shape[0], 1)  # its gradient is summed along the row
    x = torch.rand(*shape, device="cuda")

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        mu, logvar, recon = leaves
        z, kl = fastvae.rsample_kl(mu, logvar)
        loss = fastvae.elbo_loss(recon + z, x, kl=kl)
        loss = loss + fastvae.log_likelihood((recon, scale), x, "gaussian_logvar").sum()
        grads = torch.autograd.grad(loss, [*leaves, scale])
        return [z.detach(), kl.detach(), loss.detach(), *grads]

    same(run(), run())


@families
@dtypes
@pytest.mark.parametrize("shape", [(4, 3, 17), (3, 5000)], ids=str)
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_the_kernels_agree_with_eager(
    kernels: str, family: Family, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, *params = (t.cuda() for t in family.inputs(shape, dtype, 2))
    mu, logvar = (torch.randn(shape[0], 70, device="cuda").to(dtype) for _ in range(2))
    results = []
    for backend in (kernels, "eager"):
        leaves = [t.detach().requires_grad_() for t in (*params, mu, logvar)]
        torch.manual_seed(2)
        z, kl = fastvae.rsample_kl(*leaves[-2:], backend=backend)
        recon: Any = leaves[0] if len(params) == 1 else tuple(leaves[:-2])
        per_sample = fastvae.elbo_loss(
            recon, x, kl=kl, likelihood=family.make(), reduction="none", backend=backend
        )
        loss = (per_sample * upstream_like(per_sample.shape).cuda()).sum() + z.float().sum()
        grads = torch.autograd.grad(loss, leaves)
        results.append([z.detach(), kl.detach(), per_sample.detach(), *grads])
    eps, last = torch.finfo(dtype).eps, len(results[0]) - 1
    for i, (got, expected) in enumerate(zip(*results, strict=True)):
        assert got.dtype == expected.dtype
        # z and logvar's gradient hold the noise: a float32 whose last place is a backend's own
        near = 16 * eps if i not in (0, last) else max(16 * eps, 64 * 2.0**-23)
        size = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=near, atol=near * size)


def test_compiled_draws_and_differentiates_alike() -> None:
    torch._dynamo.reset()
    mu, logvar, weight = normal(8, 16), normal(8, 16), normal(16, 40)
    x = torch.rand(8, 40, device="cuda")
    criterion = fastvae.ELBOLoss()

    def step(mu: Tensor, logvar: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        z, kl = fastvae.rsample_kl(mu, logvar)
        return criterion(z @ weight, x, kl=kl), z

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        torch.manual_seed(7)
        loss, z = function(mu, logvar, weight)
        results.append([z.detach(), loss, *torch.autograd.grad(loss, (mu, logvar, weight))])
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------ large tensors


def needs(gigabytes: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of device memory, {free:.0f} are free")


def test_more_rows_than_a_grid_dimension_holds() -> None:
    """65,535 is the most in all dimensions but the first; here each row has a program."""
    x, logits = torch.rand(70_000, 1024, device="cuda"), normal(70_000, 1024)
    value = fastvae.log_likelihood(logits, x)
    (grad,) = torch.autograd.grad(value, logits, torch.linspace(1, 2, 70_000, device="cuda"))
    eager = fastvae.log_likelihood(logits, x, backend="eager")
    (other,) = torch.autograd.grad(eager, logits, torch.linspace(1, 2, 70_000, device="cuda"))
    torch.testing.assert_close(value, eager)
    torch.testing.assert_close(grad, other)
    few = torch.randn(70_000, 3, device="cuda")
    kl = fastvae.kl_divergence(few, few)
    torch.testing.assert_close(kl, fastvae.kl_divergence(few, few, backend="eager"))


def test_more_than_2_31_elements_are_read_and_written() -> None:
    needs(16)
    cols = 2**30 + 7
    x = torch.zeros(2, cols, dtype=torch.bool, device="cuda")
    x[0, :3] = x[1, -5:] = True
    half = Gaussian(normalized=False)
    zero = torch.zeros((), device="cuda")
    value = fastvae.log_likelihood(zero.expand(2, cols), x, half)
    assert value.tolist() == [-1.5, -2.5]
    mean = torch.zeros(2, cols, dtype=torch.bfloat16, device="cuda").requires_grad_()
    (grad,) = torch.autograd.grad(fastvae.log_likelihood(mean, x, half).sum(), mean)
    assert torch.equal(grad != 0, x)
    assert (grad[0, :3] == 1).all() and (grad[1, -5:] == 1).all()


def test_more_than_2_31_elements_are_drawn() -> None:
    needs(8)
    cols = 2**30 + 64
    seed = torch.tensor([11], device="cuda")
    zero = torch.zeros((), dtype=torch.float16, device="cuda").expand(2, cols)
    with torch.no_grad():
        z = ops.rsample(zero, zero, seed)
    for row, col in ((0, 0), (0, cols - 64), (1, 0), (1, cols - 64)):
        expected = ops.noise(seed, [1, 64], 1, (row * cols + col) // 64).view(64)
        assert torch.equal(z[row, col : col + 64], expected.half())
