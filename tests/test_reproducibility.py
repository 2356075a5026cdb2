"""The noise under torch's own means of reproducing it: seeds, RNG state, checkpointing, splits."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from model import VAE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastvae
from fastvae.likelihoods import Gaussian


def draw(**options: Any) -> Tensor:
    mu = torch.zeros(5, 7)
    return fastvae.rsample(mu, mu, **options)


def test_saved_and_restored_state(quick_backend: str) -> None:
    draw(backend=quick_backend)
    device = torch.get_default_device()
    rng = torch.cuda if device.type == "cuda" else torch
    state = rng.get_rng_state()
    want = [draw(backend=quick_backend) for _ in range(3)]
    assert not torch.equal(want[0], want[1])
    rng.set_rng_state(state)
    assert all(torch.equal(draw(backend=quick_backend), z) for z in want)

    generator = torch.Generator(device)
    state = generator.get_state()
    first = draw(generator=generator, backend=quick_backend)
    generator.set_state(state)
    assert torch.equal(draw(generator=generator, backend=quick_backend), first)


def test_fork_rng_leaves_the_stream_where_it_was(quick_backend: str) -> None:
    torch.manual_seed(4)
    want = draw(backend=quick_backend)
    torch.manual_seed(4)
    device = torch.get_default_device()
    with torch.random.fork_rng(devices=[0] if device.type == "cuda" else []):
        inside = draw(backend=quick_backend)
        draw(backend=quick_backend)
    assert torch.equal(inside, want)
    assert torch.equal(draw(backend=quick_backend), want)


def test_torchs_own_draws_interleave() -> None:
    """A draw of ours moves torch's generator by one, whatever its size."""
    states = []
    for shape in ((1, 1), (300, 400)):
        torch.manual_seed(8)
        fastvae.rsample(torch.zeros(shape), torch.zeros(shape))
        states.append(torch.rand(3))
    assert torch.equal(*states)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("fused", [False, True], ids=["rsample", "rsample_kl"])
def test_checkpointing_recomputes_the_same_noise(
    fused: bool, use_reentrant: bool, quick_backend: str
) -> None:
    """Proven by gradients: those of a square depend on the draw."""
    encoder, decoder = nn.Linear(6, 8), nn.Linear(4, 6)
    x = torch.rand(9, 6).requires_grad_()  # the reentrant kind wants an input with a gradient
    calls = []

    def block(x: Tensor) -> Tensor:
        calls.append(1)
        mu, logvar = encoder(x).chunk(2, dim=1)
        if fused:
            z, kl = fastvae.rsample_kl(mu, logvar, backend=quick_backend)
        else:
            z, kl = fastvae.rsample(mu, logvar, backend=quick_backend), mu.new_zeros(9)
        return decoder(z).square().sum(1) + kl

    parameters = [*encoder.parameters(), *decoder.parameters()]
    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        torch.manual_seed(11)
        for p in parameters:
            p.grad = None
        value = run(x)
        torch.rand(5)  # in between, the stream moves on
        value.sum().backward()
        results.append([value.detach(), *(p.grad for p in parameters)])
    assert len(calls) == 3
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_any_split_of_a_batch_gives_the_same_gradients() -> None:
    """1 × 256, 4 × 64 with accumulation, and what two ranks average, in any order of the rows."""
    vae, x = VAE(Gaussian(logvar="learned")), torch.rand(256, 12)
    results = []
    for pieces in (
        [torch.arange(256)],
        list(torch.arange(256).split(64)),
        [torch.arange(rank, 256, 2) for rank in range(2)],  # as DistributedSampler deals
        list(torch.randperm(256).split(32)),
    ):
        vae.zero_grad()
        for rows in pieces:
            loss = vae(x[rows], seed=99, sample_index=rows) * len(rows) / 256
            loss.backward()
        results.append([p.grad.clone() for p in vae.parameters()])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
    vae.zero_grad()
    vae(x, seed=100, sample_index=torch.arange(256)).backward()
    assert not torch.allclose(vae.encoder.weight.grad, results[0][0], rtol=1e-3)


def test_two_threads_share_no_noise(one_and_two_threads: list[int]) -> None:
    """Two Python threads draw at once: every draw is another one, and together they are those that
    one thread would have made."""
    mu = torch.zeros(64, 40)

    def key(z: Tensor) -> tuple[float, ...]:
        return tuple(z[0, :4].tolist())

    torch.manual_seed(21)
    wanted = {key(fastvae.rsample(mu, mu)) for _ in range(400)}
    drawn: list[list[tuple[float, ...]]] = [[], []]
    start = threading.Barrier(2)

    def work(mine: list[tuple[float, ...]]) -> None:
        start.wait()
        for _ in range(200):
            leaf = mu.clone().requires_grad_()
            z, kl = fastvae.rsample_kl(leaf, leaf)
            fastvae.elbo_loss(z, torch.zeros(64, 40), kl=kl, likelihood="gaussian").backward()
            mine.append(key(z))

    torch.manual_seed(21)
    threads = [threading.Thread(target=work, args=(mine,)) for mine in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wanted) == 400
    assert set(drawn[0]) | set(drawn[1]) == wanted
    assert len(drawn[0]) == len(drawn[1]) == 200


def test_seeds_next_to_each_other_are_unrelated() -> None:
    z = torch.stack(
        [fastvae.rsample(torch.zeros(100, 64), torch.zeros(100, 64), seed=s) for s in range(20)]
    )
    correlation = torch.corrcoef(z.flatten(1)) - torch.eye(20)
    assert correlation.abs().max() < 5 / 80  # five standard errors of 6400 pairs
