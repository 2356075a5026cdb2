"""How the Triton kernels are launched: the block rule, 64-bit offsets, the options, and where.

On the GPU where there is one, else in the interpreter.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from cases import run
from conftest import GPU
from test_triton import plain
from torch import Tensor

import fastvae
from fastvae._triton import launch, rowwise, sample_backward, scale_grad
from fastvae._triton.sampling import sample_backward_kernel

ops = torch.ops.fastvae


@pytest.mark.parametrize("tile", [launch.TILE, launch.TILE // 2, 2 * launch.TILE])
@pytest.mark.parametrize("least", [1, 64])
@pytest.mark.parametrize("cols", [0, 1, 2, 3, 63, 64, 65, 784, 1023, 1024, 1025, 10**6])
def test_tile_shape(cols: int, least: int, tile: int) -> None:
    rows, columns = launch.tile_shape(cols, least, tile)
    assert rows * columns == tile
    assert columns.bit_count() == 1 and least <= columns <= tile
    assert columns >= min(cols, tile)
    assert columns == least or columns < 2 * max(cols, 1)


@pytest.mark.parametrize("row_programs", [1, 2, 3, 1000, 1024, 1025, 10**6])
@pytest.mark.parametrize("cols", [0, 1, 1024, 1025, 4097, 10**6, 2**31 + 5])
@pytest.mark.parametrize("columns", [64, 1024])
def test_splits(row_programs: int, cols: int, columns: int) -> None:
    split, chunk = launch.splits(row_programs, cols, columns)
    assert split >= 1 and chunk >= columns and chunk % columns == 0
    assert (split - 1) * chunk < max(cols, 1) <= max(split * chunk, 1)  # none is empty, all is done
    if row_programs >= launch.PROGRAMS or cols <= columns:
        assert split == 1
    assert split * row_programs < 2 * launch.PROGRAMS or split == 1
    tiles = triton.cdiv(cols, columns)
    assert 2 * split * row_programs >= min(launch.PROGRAMS, tiles * row_programs)


def test_index_type() -> None:
    def stored(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    small, far = stored(15), stored(2**31 + 5).as_strided((2, 5), (2**31, 1))
    assert launch.index_type(small.view(3, 5), None) is tl.int32
    assert launch.index_type(stored(1).expand(2**20, 2**40)) is tl.int32
    assert launch.index_type(stored(0).view(0, 7)) is tl.int32
    assert launch.index_type(stored(2**30, torch.float64)) is tl.int32  # elements are counted
    assert launch.index_type(small, None, far) is tl.int64
    assert launch.index_type(stored(2**31).view(2**16, 2**15)) is tl.int64
    # A tile that begins at the last element ends behind it.
    assert launch.index_type(stored(2**31 - launch.TILE, torch.uint8)) is tl.int64


class Spy:
    """Runs what is launched, and keeps it."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, int, dict[str, Any]]] = []

    def __call__(self, kernel: Any, programs: int, *args: Any, **constexprs: Any) -> None:
        self.launched.append((kernel.fn.__name__, programs, constexprs))
        with launch.launches_to(None):
            launch.launch(kernel, programs, *args, **constexprs)

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.launched]


def test_rows_that_are_2_31_elements_apart(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the pages that are touched exist: memory must not be filled."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    cols, stride = 40, 2**31 + 3
    storage = torch.empty(stride + cols, dtype=torch.uint8, device=triton_device)
    x = storage.as_strided((2, cols), (stride, 1))
    x.copy_(torch.arange(2 * cols).view(2, cols) % 7)
    mean = torch.randn(2, cols, device=triton_device)
    value, grad = torch.empty(2, device=triton_device), torch.empty(2, cols, device=triton_device)
    with launch.launches_to(spy := Spy()):
        rowwise("gaussian", [x, mean], None, None, [1.0, 0.0], 1.0, 2, value, [grad], [False, True])
    ((_, _, constexprs),) = spy.launched
    assert constexprs["INDEX"] is tl.int64
    difference = x.float() - mean
    torch.testing.assert_close(value, -0.5 * difference.square().sum(1))
    assert torch.equal(grad, difference)


def test_draws_that_are_2_31_rows_apart(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above. One program, for the first rows of a batch that is said to have 2^30; where a row's
    number wraps around, it reads the storage's other half."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    batch, num_samples, rows = 2**30, 3, 4
    storage = torch.empty(2**32 + rows, dtype=torch.uint8, device=triton_device)
    storage[:rows] = 100
    grad_z = storage[2**31 :]
    expected = torch.zeros(rows)
    for k in range(num_samples):
        drawn = torch.arange(rows, dtype=torch.uint8) + 10 * k
        grad_z[k * batch : k * batch + rows] = drawn.to(triton_device)
        expected += drawn
    mu, seed = torch.zeros(rows, 1, device=triton_device), torch.tensor([3], device=triton_device)
    grads = [torch.empty(rows, 1, device=triton_device) for _ in range(2)]
    launch.launch(
        sample_backward_kernel, 1, grad_z, None, mu, mu, 1, 0, 1, 1, seed, *grads, batch, 1,
        num_samples, 0, None, 1, 1, COMPUTE=tl.float32, INDEX=tl.int64, GRAD_Z_COL=1, MU_COL=1,
        LOGVAR_COL=1, FOUR=False, R=rows, C=1,
    )  # fmt: skip
    assert torch.equal(grads[0].cpu().view(-1), expected)


def test_a_gradient_per_row_may_lie_far_apart() -> None:
    """A column of a large matrix; nothing runs, the tensors have no memory."""

    def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    far = meta(3 * 2**30).as_strided((3, 1), (2**30, 1))
    small = [meta(3, 5) for _ in range(5)]
    launched = []
    with launch.launches_to(lambda *args, **constexprs: launched.append(constexprs["INDEX"])):
        for per_row in (meta(3, 1), far):
            scale_grad(small[0], per_row.view(-1))
            seed = meta(1, dtype=torch.int64)
            sample_backward(None, per_row, *small[:2], seed, 1, 0, None, *small[2:4])
    assert launched == [tl.int32] * 2 + [tl.int64] * 2


@pytest.mark.parametrize("warp_size", [32, 64])
def test_the_device_says_how_large_a_warp_is(
    warp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program has 128 threads; `gfx1100` and its like have warps of 32, `gfx942` of 64."""
    launch._options_of.cache_clear()
    asked = []

    def properties(device: int) -> Any:
        asked.append(device)
        return SimpleNamespace(warp_size=warp_size)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", None)
    assert launch.device_options()["num_warps"] == 4 and asked == []
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert launch.device_options()["num_warps"] == 128 // warp_size
    assert launch.device_options()["num_warps"] == 128 // warp_size and asked == [1]
    launch._options_of.cache_clear()


def test_a_row_that_is_split_gives_the_same_bits_twice(triton_device: str) -> None:
    shape = (2, 9 * launch.TILE + 5)
    inputs = [torch.rand(shape), torch.randn(shape), torch.randn(2, 1)]
    mu, seed = torch.randn(shape, device=triton_device), torch.tensor([3], device=triton_device)

    def both(where: str) -> list[Tensor]:
        given = [t.to(where) for t in inputs]
        value, grads = run(lambda x, *p: ops.log_likelihood(x, p, "gaussian_logvar", [0.5]), given)
        return [value, *grads]

    with launch.launches_to(spy := Spy()):
        first = [*both(triton_device), *ops.rsample_kl(mu, mu, seed)]
        second = [*both(triton_device), *ops.rsample_kl(mu, mu, seed)]
    rows = [programs for name, programs, _ in spy.launched if name == "rowwise_kernel"]
    assert rows == [20, 20]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for got, cpp in zip(first, plain(lambda: both("cpu")), strict=False):
        torch.testing.assert_close(got.cpu(), cpp, rtol=3e-6, atol=1e-5)


@pytest.mark.skipif(GPU, reason="on a GPU the tensor's device decides")
def test_backward_runs_where_its_forward_did() -> None:
    mu, logvar, x = torch.randn(3, 7), torch.randn(3, 7), torch.rand(3, 7)
    leaves = [mu.requires_grad_(), logvar.requires_grad_()]
    with launch.launches_to(spy := Spy()):
        z, kl = fastvae.rsample_kl(*leaves, backend="triton")
        loss = fastvae.elbo_loss(z, x, kl=kl, backend="triton")
        assert spy.names == ["sample_stream_kernel", "rowwise_kernel", "elbo_reduce_kernel"]
        fastvae.rsample(*leaves)  # by now CPU tensors go to C++ again
        assert len(spy.launched) == 3
        (3 * loss).backward()
        assert spy.names[3:] == ["scale_grad_kernel", "sample_stream_backward_kernel"]
        fastvae.rsample_kl(*leaves)[0].sum().backward()
        assert len(spy.launched) == 5
    half = mu.detach().half().requires_grad_()
    with launch.launches_to(spy := Spy()):  # float16: the gradient is made in the backward
        fastvae.log_likelihood(half, x, backend="triton").sum().backward()
    assert spy.names == ["rowwise_kernel", "rowwise_kernel"]


ARGUMENTS = [
    None, 0.0, 1.0, 2.5, float("nan"), -(2**63), -(2**31) - 1, -(2**31), -16, -1, 0, 1, 2, 15, 16,
    17, 784, 2**31 - 1, 2**31, 2**31 + 1, 2**62, 2**63 - 1,
    *(torch.zeros(9, dtype=d)[i:] for d in (torch.float32, torch.uint8) for i in (0, 1)),
    (), (1,), (1, 2), (2, 1), (None, 16), (torch.zeros(3), 0.5), (torch.zeros(3), 1), ((1, 2), 3),
    (1, (2, 3)), torch.zeros(3, dtype=torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("target", [("cuda", 90, 32), ("hip", "gfx942", 64)], ids=["cuda", "hip"])
def test_launch_key_knows_what_triton_looks_at(target: tuple[str, Any, int]) -> None:
    """Arguments for which Triton compiles different kernels have different keys."""
    jit = pytest.importorskip("triton.runtime.jit")
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("this Triton looks at its arguments in another way")
    backend = triton.compiler.make_backend(triton.compiler.compiler.GPUTarget(*target))
    # On AMD's devices, whether 32 bits reach the end of a tensor's memory, here untouched.
    ends = (torch.UntypedStorage(2**31 - n) for n in (4, 0))
    arguments = [*ARGUMENTS, *(torch.empty(0).set_(end, 0, (3,)) for end in ends)]
    looks = [jit.native_specialize_impl(backend, a, False, True, True) for a in arguments]
    keys = [launch.launch_key((a,)) for a in arguments]
    assert None not in keys
    for look, key in zip(looks, keys, strict=True):
        assert [a for a, k in zip(looks, keys, strict=True) if k == key and a != look] == []


def test_launch_key_of_what_it_does_not_know() -> None:
    for unknown in (object(), "text", True, 2**63, [1], torch.float32, (1, object())):
        assert launch.launch_key((unknown,)) is None


class Kernel:
    """Stands for Triton's: remembers what was compiled, and what then ran."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.ran: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_run(*args: Any, **constants: Any) -> Any:
            self.compiled.append((grid, args, constants))
            return self.binary()

        return compile_and_run

    def binary(self) -> Any:
        ran = self.ran

        class Compiled:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                return lambda *args: ran.append((grid, args))

        return Compiled()


def test_what_triton_compiled_is_launched_by_our_key(monkeypatch: pytest.MonkeyPatch) -> None:
    device = 0
    active = SimpleNamespace(get_current_device=lambda: device)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(launch, "device_options", lambda: {"num_warps": 4})
    monkeypatch.setattr(launch, "_compiled", {})
    kernel, x = Kernel(), torch.zeros(40)
    launch.launch(kernel, 3, x, 7, BLOCK=64)
    assert kernel.compiled == [((3,), (x, 7), {"BLOCK": 64, "num_warps": 4})] and not kernel.ran
    launch.launch(kernel, 5, x[4:], 9, BLOCK=64)  # aligned alike
    assert len(kernel.compiled) == 1
    ((grid, (tensor, n, block)),) = kernel.ran
    assert grid == (5, 1, 1) and tensor.data_ptr() == x[4:].data_ptr() and (n, block) == (9, 64)
    for args, constants in [
        ((x[1:], 7), {"BLOCK": 64}),
        ((x, 16), {"BLOCK": 64}),
        ((x, 7), {"BLOCK": 128}),
        ((x, "?"), {"BLOCK": 64}),
        ((x, "?"), {"BLOCK": 64}),  # not known: Triton looks each time
    ]:
        before = len(kernel.compiled)
        launch.launch(kernel, 3, *args, **constants)
        assert len(kernel.compiled) == before + 1
    device = 1
    launch.launch(kernel, 3, x, 7, BLOCK=64)
    assert len(kernel.compiled) == 7 and len(kernel.ran) == 1
