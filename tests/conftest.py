from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import pytest
import torch

GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
if GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else each matmul warns
else:  # before the kernels are built: they run in Triton's interpreter, on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cases  # noqa: E402

import fastvae  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.repair()


# What takes long, or needs what `make test` does not install; of these `make test` runs what is
# marked quick.
SLOW_FILES = ("aot", "demo", "distributed", "docs", "examples", "integrations", "processes")
SLOW_FILES += ("setup", "properties", "mistakes", "changed_inputs", "contributing", "cuda_kernels")
SLOW_FILES += ("export", "triton_ptx")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--products",
        choices=["quick", "rest", "all"],
        help="quick: what belongs to the loop once per kind of formula, what belongs to a formula "
        "once; rest: what quick leaves out; all: both, as where files are named or a GPU is there",
    )


def is_quick(item: pytest.Item) -> bool:
    """Whether `make test` runs it: a sum of what can go wrong, not its product."""
    if item.get_closest_marker("full"):
        return False
    if item.get_closest_marker("quick"):
        return True
    params = getattr(getattr(item, "callspec", None), "params", {})
    if item.path.stem.removeprefix("test_") in SLOW_FILES or params.get("backend") == "triton":
        return False
    family = params.get("family")
    if not isinstance(family, cases.Family) or family.name in cases.REPRESENTATIVES:
        return True
    return (
        params.get("layout") == "contiguous" or item.get_closest_marker("every_family") is not None
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """70,001 columns take the interpreter minutes; 5,001 are split over programs just as well, and
    its rows have nothing of threads' grain.
    Exhaustive tests run when they are asked for, and on a GPU every product runs."""
    products = config.getoption("--products")
    products = products or ("all" if GPU or config.option.file_or_dir else "quick")

    def chosen(item: pytest.Item) -> bool:
        if not GPU and "triton" in item.name and re.search("70001|many_rows", item.name):
            return False
        if item.get_closest_marker("exhaustive"):
            return "exhaustive" in config.option.markexpr
        return products == "all" or is_quick(item) == (products == "quick")

    if slow := [i for i in items if not chosen(i)]:
        config.hook.pytest_deselected(items=slow)
        items[:] = [i for i in items if chosen(i)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills fresh memory with NaN (integers: with their largest value), so that an output that a
    kernel forgets to write fails instead of being right by luck."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20240229)


def require(name: str) -> str:
    """A missing backend fails, as a suite that skips the kernels proves nothing."""
    state = fastvae.backends()[name]
    if not state.available:
        if name == "cpp" and os.environ.get("FASTVAE_ALLOW_EAGER_ONLY") == "1":
            pytest.skip(f"FASTVAE_ALLOW_EAGER_ONLY=1, and cpp is unavailable: {state.detail}")
        pytest.fail(f"backend {name} is unavailable: {state.detail}")
    return name


def serve(name: str) -> Iterator[str]:
    require(name)
    on_gpu = GPU and name in ("cuda", "triton")
    with torch.device("cuda") if on_gpu else contextlib.nullcontext():
        yield name


ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton")] if GPU else []


@pytest.fixture(params=["cpp", "eager", *(ON_GPU or ["triton"])])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend. Triton's kernels run on the GPU where there is one: then every tensor that a
    test makes is there. Elsewhere they are interpreted."""
    yield from serve(request.param)


@pytest.fixture(params=["cpp", "eager", *ON_GPU])
def quick_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend but the interpreted one, for tests that would take it minutes."""
    yield from serve(request.param)


@pytest.fixture(params=ON_GPU or ["triton"])
def triton_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors go through the Triton kernels, in torch.ops.fastvae too: the GPU, or where
    there is none, the CPU, whose tensors this thread sends to the interpreter. On the GPU the
    kernels in CUDA C++ take their turn."""
    require(request.param)
    from fastvae import _C

    before = _C.to_triton(request.param == "triton")
    yield "cuda" if GPU else "cpu"
    _C.to_triton(before)


@pytest.fixture
def native() -> None:
    """For what is only there when the extension is built, whatever the backend."""
    require("cpp")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For the examples: layers this small gain nothing from a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_and_two_threads() -> Iterator[list[int]]:
    """Restores the number of threads after a test that sets it."""
    before = torch.get_num_threads()
    yield [1, 2]
    torch.set_num_threads(before)
