"""Two processes with gloo: DDP and FSDP2 against one process, noise per rank, DTensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from model import VAE
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastvae
from fastvae.likelihoods import Gaussian

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
RANKS, ROWS = 2, 32


def learned() -> Gaussian:
    """A scale for each pixel, which is a parameter of the criterion."""
    return Gaussian(logvar=nn.Parameter(torch.zeros(12)))


def worker(rank: int, rendezvous: str, check: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    check(rank)
    dist.barrier()  # none hangs up while another still listens
    dist.destroy_process_group()


def on_two_ranks(check: Callable[[int], None], folder: Path) -> None:
    """Runs check(rank) in two processes; what one of them raises is raised here."""
    mp.spawn(worker, args=(str(folder / "rendezvous"), check), nprocs=RANKS)


def gathered(t: Tensor) -> list[Tensor]:
    out = [torch.empty_like(t) for _ in range(RANKS)]
    dist.all_gather(out, t.contiguous())
    return out


def setting(
    rank: int, likelihood: Callable[[], Gaussian] = learned
) -> tuple[VAE, Tensor, Tensor, list[Tensor]]:
    """The model, this rank's rows and their indices, and the gradients of one process."""
    torch.manual_seed(0)
    vae, x = VAE(likelihood()), torch.rand(ROWS, 12)
    alone = copy.deepcopy(vae)
    alone(x, seed=7, sample_index=torch.arange(ROWS)).backward()
    rows = torch.arange(rank, ROWS, RANKS)  # as DistributedSampler deals them
    return vae, x[rows], rows, [p.grad for p in alone.parameters()]


def assert_same_gradients(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


def check_ddp(rank: int) -> None:
    vae, x, rows, want = setting(rank)
    model = DistributedDataParallel(vae)
    model(x, seed=7, sample_index=rows).backward()
    assert_same_gradients([p.grad for p in vae.parameters()], want)
    # Accumulated over two micro-batches, communicated with the second.
    vae.zero_grad()
    half = len(rows) // 2
    with model.no_sync():
        (model(x[:half], seed=7, sample_index=rows[:half]) / 2).backward()
    (model(x[half:], seed=7, sample_index=rows[half:]) / 2).backward()
    assert_same_gradients([p.grad for p in vae.parameters()], want)


def check_ddp_terms(rank: int) -> None:
    """The wrapper itself gives the parts: its hooks average the gradient."""
    criterion = fastvae.ELBOLoss(Gaussian(logvar="learned"))
    mean, x, kl = torch.full((3, 5), float(rank)), torch.zeros(3, 5), torch.ones(3)
    model = DistributedDataParallel(criterion)
    terms = model(mean, x, kl=kl, return_terms=True)
    terms.loss.backward()
    assert torch.equal(terms.kl, torch.tensor(1.0))
    torch.testing.assert_close(criterion.likelihood.logvar.grad, torch.tensor([1.25]))


def check_fsdp2(rank: int) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    for likelihood in (learned, partial(Gaussian, logvar="learned")):
        vae, x, rows, want = setting(rank, likelihood)
        for module in (vae.encoder, vae.decoder, vae):
            fully_shard(module, mesh=mesh)
        vae(x, seed=7, sample_index=rows).backward()
        assert_same_gradients([p.grad.full_tensor() for p in vae.parameters()], want)


def check_fsdp2_terms(rank: int) -> None:
    """terms() gathers a criterion's own parameters, as a call does."""
    criterion = fastvae.ELBOLoss(Gaussian(logvar="learned"))
    fully_shard(criterion, mesh=init_device_mesh("cpu", (RANKS,)))
    mean, x, kl = torch.full((3, 5), float(rank)), torch.zeros(3, 5), torch.ones(3)
    criterion.terms(mean, x, kl=kl).loss.backward()
    (parameter,) = criterion.parameters()
    torch.testing.assert_close(parameter.grad.full_tensor(), torch.tensor([1.25]))


def check_meta_init(rank: int) -> None:
    """Made on the meta device, sharded, given memory, then set to its start."""
    with torch.device("meta"):
        criterion = fastvae.ELBOLoss(Gaussian(logvar="learned"))
    fully_shard(criterion, mesh=init_device_mesh("cpu", (RANKS,)))
    criterion.to_empty(device="cpu")
    (parameter,) = criterion.parameters()
    with torch.no_grad():
        parameter.fill_(torch.nan)
    for module in criterion.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(parameter.full_tensor(), torch.zeros(1))


def check_noise(rank: int) -> None:
    mu = torch.zeros(4, 16)
    a, b = gathered(fastvae.rsample(mu, mu))  # nothing was seeded
    assert not torch.isclose(a, b).any()
    torch.manual_seed(3)
    a, b = gathered(fastvae.rsample(mu, mu))
    assert torch.equal(a, b)
    torch.manual_seed(3)
    both = torch.cat(gathered(fastvae.rsample(mu, mu, sample_offset=4 * rank)))
    torch.manual_seed(3)
    assert torch.equal(both, fastvae.rsample(torch.zeros(8, 16), torch.zeros(8, 16)))


def check_counters(rank: int) -> None:
    """DDP broadcasts buffers of rank 0; each rank's count of bad rows is its own."""
    vae = VAE(learned())
    vae.criterion.track_nonfinite = True
    model = DistributedDataParallel(vae)
    x = torch.rand(6, 12)
    x[3 + rank, 0] = torch.nan
    for _ in range(2):
        model(x)
    with pytest.raises(FloatingPointError, match=f"first in call 0, row {3 + rank}"):
        vae.criterion.check()


def check_dtensor(rank: int) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    mu = distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)])
    plain = torch.rand(6, 4)
    refused: dict[str, Callable[[], Any]] = {
        "mu": lambda: fastvae.rsample(mu, mu),
        "logvar": lambda: fastvae.rsample_kl(plain, mu),
        "prior mu": lambda: fastvae.kl_divergence(plain, plain, prior=(mu, mu)),
        "logits": lambda: fastvae.log_likelihood(mu, plain),
        "x": lambda: fastvae.elbo_loss(plain, mu, kl=torch.ones(6)),
        "kl": lambda: fastvae.elbo_loss(
            plain, plain, kl=distribute_tensor(torch.ones(6), mesh, [Shard(0)])
        ),
    }
    for name, call in refused.items():
        with pytest.raises(TypeError, match=rf"^{name} must be a plain .* got a DTensor: pass"):
            call()
    # What the message says to do: this rank's rows of what the whole batch would draw.
    whole = mu.full_tensor()
    local, index = mu.to_local(), torch.arange(3) + 3 * rank
    z = fastvae.rsample(local, local, seed=5, sample_index=index)
    assert torch.equal(z, fastvae.rsample(whole, whole, seed=5)[index])


CHECKS = [check_ddp, check_ddp_terms, check_fsdp2, check_fsdp2_terms, check_meta_init]


@pytest.mark.parametrize("check", [*CHECKS, check_noise, check_counters, check_dtensor])
def test_on_two_ranks(check: Callable[[int], None], tmp_path: Path) -> None:
    on_two_ranks(check, tmp_path)
