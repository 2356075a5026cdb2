"""torch.compile of a whole training step, torch.export and AOTInductor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from model import VAE
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastvae
from fastvae._backends import select, triton
from fastvae.likelihoods import Gaussian


class Reconstruct(nn.Module):
    """What is exported: a model that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = VAE("bernoulli")

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.vae.encoder(x).chunk(2, dim=1)
        recon: Tensor = self.vae.decoder(fastvae.rsample(mu, logvar))
        return recon


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def step(model: Any, module: nn.Module, x: Tensor, seed: int) -> list[Tensor]:
    """The loss and every gradient."""
    torch.manual_seed(seed)
    module.zero_grad()
    loss = model(x)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize(
    "likelihood",
    [pytest.param("bernoulli", marks=pytest.mark.full), Gaussian(logvar="learned")],
    ids=str,
)
def test_a_training_step_compiles_at_most_twice(likelihood: Any) -> None:
    """Draws, loss and gradients are the uncompiled ones; the second batch size makes it dynamic."""
    vae = VAE(likelihood)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(vae, fullgraph=True, backend=counter)
    for seed, batch in enumerate((6, 6, 11, 32, 17, 100)):
        x = torch.rand(batch, 12)
        for got, want in zip(step(compiled, vae, x, seed), step(vae, vae, x, seed), strict=True):
            torch.testing.assert_close(got, want)
        assert counter.frame_count == (1 if seed < 2 else 2), f"batch {batch} compiled again"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_operator_fixes_the_batch(reduction: str) -> None:
    """All of them, with every argument, under one dynamic graph."""
    decoder, prior = nn.Linear(4, 18), [nn.Parameter(torch.randn(4)) for _ in range(2)]
    leaves = [*decoder.parameters(), *prior]

    def losses(mu: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        z, kl = fastvae.rsample_kl(mu, mu.sin(), prior=(prior[0], prior[1]), num_samples=3)
        recon = decoder(z).chunk(2, dim=-1)
        loss = fastvae.elbo_loss(
            recon, x, kl=kl + fastvae.kl_divergence(mu, mu.cos()), likelihood="gaussian_logvar",
            beta=0.5, reduction=reduction, sample_weight=weight, mask=x > 0.3,
        )  # fmt: skip
        parts = fastvae.log_likelihood(recon[0].sigmoid(), x, "bernoulli_probs").mean(0)
        return loss.sum() + (parts * weight).sum()

    counter, first = CompileCounterWithBackend("aot_eager"), 0
    compiled = torch.compile(losses, fullgraph=True, backend=counter, dynamic=True)
    for batch in (5, 8, 3, 64):
        mu, x, weight = torch.randn(batch, 4), torch.rand(batch, 9), torch.rand(batch)
        mu.requires_grad_()
        results = []
        for f in (compiled, losses):
            torch.manual_seed(batch)
            loss = f(mu, x, weight)
            results.append((loss, *torch.autograd.grad(loss, [mu, *leaves])))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
        first = first or counter.frame_count  # a float that varies makes torch start over once
    assert counter.frame_count == first


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_draws_in_one_graph_differ(backend: str) -> None:
    """AOTAutograd merges equal calls, and knows of torch's random operators alone."""

    def draws(mu: Tensor) -> Tensor:
        z, _ = fastvae.rsample_kl(mu, mu)
        return torch.stack([z, *(fastvae.rsample(mu, mu) for _ in range(2))])

    mu = torch.randn(3, 4).requires_grad_()
    results = []
    for f in (torch.compile(draws, fullgraph=True, backend=backend), draws):
        torch.manual_seed(1)
        z = f(mu)
        results.append((z, *torch.autograd.grad(z.square().sum(), mu)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert not torch.isclose(z[0], z[1]).any() and not torch.isclose(z[1], z[2]).any()


def test_a_given_seed_is_immune_to_other_random_operators() -> None:
    """Inductor draws for a dropout in its own way, which shifts later seeds."""

    def draw(mu: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.dropout(mu, 0.5, True)
        return kept, fastvae.rsample(mu, mu, seed=4)

    mu = torch.randn(3, 4)
    _, z = torch.compile(draw, fullgraph=True)(mu)
    torch.testing.assert_close(z, fastvae.rsample(mu, mu, seed=4))


def test_numbers_as_prior_compile_once_more() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    mu, logvar = torch.randn(3, 4), torch.randn(3, 4)

    def kl(value: float) -> Tensor:
        return fastvae.kl_divergence(mu, logvar, prior=(0.0, value))

    compiled = torch.compile(kl, fullgraph=True, backend=counter)
    for value in (0.1, 0.2, 0.3, -1.0):
        torch.testing.assert_close(compiled(value), kl(value))
    assert counter.frame_count <= 2


def test_the_choice_of_a_backend_for_cuda_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look at the file system, which breaks a graph."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def f(x: Tensor) -> Tensor:
        ops = select("auto", torch.device("cuda"))
        return x + (1 if ops is triton else 2)

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1, 1]


class Annealed(nn.Module):
    """docs/recipes.md: evaluation without noise, and β from a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.vae, self.criterion = VAE("bernoulli"), fastvae.ELBOLoss()

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.vae.encoder(x).chunk(2, dim=1)
        z = fastvae.rsample(mu, logvar) if self.training else mu
        loss: Tensor = self.criterion(self.vae.decoder(z), x, mu, logvar)
        return loss


def test_evaluation_and_annealing_compile() -> None:
    model, x, beta = Annealed(), torch.rand(4, 12), fastvae.schedules.Linear(5)
    model.criterion.beta = torch.tensor(0.0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for number in range(7):  # a number for beta would be compiled once more
        model.criterion.beta = torch.tensor(beta(number))
        for got, want in zip(step(compiled, model, x, 3), step(model, model, x, 3), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    assert compiled(x).equal(compiled(x)) and counter.frame_count == 2


def test_the_losses_own_precision_is_kept() -> None:
    """What is traced multiplies the KL by β itself."""
    loss = torch.compile(fastvae.elbo_loss, fullgraph=True, backend="aot_eager")
    x, recon = torch.rand(3, 5), torch.randn(3, 5)
    large = torch.full((3,), 60000.0, dtype=torch.float16)
    for r, kl in ((recon, large), (recon, torch.rand(3).bfloat16()), (recon.double(), large)):
        for reduction in ("mean", "none"):
            got = loss(r, x, kl=kl, beta=4.0, reduction=reduction)
            want = fastvae.elbo_loss(r, x, kl=kl, beta=4.0, reduction=reduction)
            rtol = 1e-14 if r.dtype == torch.float64 else 2e-7
            torch.testing.assert_close(got, want, rtol=rtol, atol=0)


def test_a_bad_index_is_refused_in_a_compiled_graph_too() -> None:
    draw = torch.compile(lambda m, i: fastvae.rsample(m, m, seed=1, sample_index=i), fullgraph=True)
    with pytest.raises(ValueError, match=r"sample_index must be at least 0 .* got -1 in row 1"):
        draw(torch.zeros(3, 4), torch.tensor([3, -1, 2]))


def test_a_seed_is_no_constant_of_the_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    draw = torch.compile(
        lambda m, seed, index: fastvae.rsample(m, m, seed=seed, sample_index=index),
        fullgraph=True,
        backend=counter,
    )
    mu, index = torch.zeros(5, 3), torch.tensor([4, 0, 2, 9, 1])
    for seed in range(1, 9):
        want = fastvae.rsample(mu, mu, seed=seed, sample_index=index)
        assert torch.equal(draw(mu, seed, index), want)
    assert counter.frame_count <= 2


def test_compiled_functorch_transforms() -> None:
    vae, x = VAE("bernoulli"), torch.rand(5, 12)

    def loss(x: Tensor) -> Tensor:
        return fastvae.log_likelihood(vae.decoder(x[None, :5]), x[None]).sum()

    per_sample = torch.vmap(torch.func.grad(loss))
    got = torch.compile(per_sample, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, per_sample(x))


@pytest.fixture(scope="module")
def exported() -> tuple[Reconstruct, Any]:
    torch._dynamo.reset()
    model = Reconstruct()
    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(model, (torch.rand(6, 12),), dynamic_shapes={"x": {0: batch}})
    return model, program


def assert_draws_alike(got: Any, want: Any) -> None:
    for batch in (6, 2, 333):
        x = torch.rand(batch, 12)
        results = []
        for f in (got, want):
            torch.manual_seed(batch)
            with torch.no_grad():
                results.append(f(x))
        torch.testing.assert_close(*results)
        with torch.no_grad():
            assert not torch.equal(got(x), got(x))  # the next call, the next noise


def test_export(exported: tuple[Reconstruct, Any], tmp_path: Path) -> None:
    model, program = exported
    targets = [str(node.target) for node in program.graph.nodes]
    assert "fastvae.seed.default" in targets and "fastvae.rsample.default" in targets
    assert_draws_alike(program.module(), model)
    torch.export.save(program, tmp_path / "vae.pt2")
    assert_draws_alike(torch.export.load(tmp_path / "vae.pt2").module(), model)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own use of it
def test_aot_inductor_package(exported: tuple[Reconstruct, Any], tmp_path: Path) -> None:
    model, program = exported
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "vae.pt2")
        )
    assert_draws_alike(torch._inductor.aoti_load_package(package), model)
