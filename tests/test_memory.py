"""Large CPU outputs reuse memory that has been given back, never memory that somebody holds."""

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastvae

pytestmark = pytest.mark.skipif(
    not fastvae.backends()["cpp"].available, reason="only the C++ backend keeps memory"
)

ROWS, COLUMNS = 64, 2048  # 512 KiB: above what malloc is left to


@pytest.fixture(autouse=True)
def empty() -> None:
    fastvae.empty_cache()


def sample(value: float = 0.0, rows: int = ROWS) -> Tensor:
    """A large output whose elements are all `value`."""
    return fastvae.rsample(
        torch.full((rows, COLUMNS), value), torch.full((rows, COLUMNS), -float("inf"))
    )


def test_memory_given_back_is_used_again() -> None:
    z = sample(1.0)
    address = z.data_ptr()
    del z
    assert sample(2.0).data_ptr() == address


HOLDERS: dict[str, Callable[[Tensor], object]] = {
    "view": lambda z: z[3:5, 7:9],
    "transpose": lambda z: z.t(),
    "detached": lambda z: z.detach(),
    "numpy": lambda z: z.numpy(),
    "storage": lambda z: z.untyped_storage(),
    "dlpack": lambda z: torch.from_dlpack(z),
    "set_": lambda z: torch.empty(0).set_(z.untyped_storage()),
    "closure": lambda z: lambda: z,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_somebody_holds_is_not_handed_out(holder: str) -> None:
    z = sample(1.0)
    address = z.data_ptr()
    held = HOLDERS[holder](z)
    del z
    gc.collect()
    others = [sample(float(i)) for i in range(8)]
    assert address not in [t.data_ptr() for t in others]
    del held
    gc.collect()
    assert sample(3.0).data_ptr() == address


def test_what_a_graph_holds_is_not_handed_out() -> None:
    x, leaf = torch.rand(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS, requires_grad=True)
    losses = [fastvae.log_likelihood(leaf * k, x).sum() for k in (1.0, 2.0, 3.0)]
    got = [torch.autograd.grad(loss, leaf)[0] for loss in losses]
    for k, g in zip((1.0, 2.0, 3.0), got, strict=True):
        torch.testing.assert_close(g, k * (x - torch.sigmoid(leaf.detach() * k)))


def test_accumulated_gradients_are_their_own() -> None:
    x, leaf = torch.rand(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS, requires_grad=True)
    fastvae.log_likelihood(leaf, x).sum().backward()
    assert leaf.grad is not None
    before = leaf.grad.clone()
    others = [sample(float(i)) for i in range(8)]
    assert torch.equal(leaf.grad, before) and len(others) == 8


def test_a_weak_reference_keeps_nothing() -> None:
    z = sample(1.0)
    reference, address = weakref.ref(z), z.data_ptr()
    del z
    assert reference() is None and sample().data_ptr() == address


def test_a_resized_output_keeps_its_own_memory() -> None:
    z = sample(1.0)
    z.resize_(4 * ROWS, COLUMNS)
    other = sample(5.0)
    z.fill_(2.0)
    assert (other == 5.0).all()


def test_smaller_and_much_smaller_outputs() -> None:
    z = sample(1.0, rows=4 * ROWS)
    address = z.data_ptr()
    del z
    assert sample(rows=ROWS).data_ptr() != address  # would waste three quarters of it
    assert sample(rows=3 * ROWS).data_ptr() == address


def test_empty_cache_says_what_it_freed() -> None:
    assert fastvae.empty_cache() == 0
    z = sample()
    assert fastvae.empty_cache() == 0  # in use
    nbytes = z.nbytes
    del z
    assert fastvae.empty_cache() == nbytes
    assert fastvae.empty_cache() == 0


def test_what_is_kept_is_bounded() -> None:
    held = [sample() for _ in range(12)]
    nbytes = held[0].nbytes
    held.clear()
    assert fastvae.empty_cache() <= 4 * nbytes


def test_old_memory_is_freed_in_the_end() -> None:
    large = sample(rows=8 * ROWS)
    nbytes = large.nbytes
    del large
    for _ in range(100):
        sample()
    assert 0 < fastvae.empty_cache() < nbytes


SCRIPT = """
import os, torch, fastvae
def sample():
    return fastvae.rsample(torch.zeros(64, 2048), torch.zeros(64, 2048))
if os.environ.get("FASTVAE_CACHE") == "0":
    sample(); assert fastvae.empty_cache() == 0
torch.set_num_threads(1)
z = sample(); a = z.data_ptr(); before = z.clone(); del z; z = sample(); before = z.clone()
if (child := os.fork()) == 0:
    for _ in range(4): sample().fill_(7.0)
    os._exit(0 if torch.equal(z, before) else 1)
for _ in range(4): sample().fill_(8.0)
assert torch.equal(z, before)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("cache", ["0", "1"])
def test_a_forked_child_and_the_switch(cache: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"FASTVAE_CACHE": cache},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "fine\n", run.stderr


def test_threads_that_allocate_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def work(k: int) -> bool:
        return all(bool((sample(float(k + i)) == k + i).all()) for i in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(0, 400, 100)))
