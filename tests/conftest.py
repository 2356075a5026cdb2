from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import fastvae


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


@pytest.fixture(params=["cpp", "eager"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every CPU backend."""
    return require(request.param)


@pytest.fixture
def native() -> None:
    """For what is only there when the extension is built, whatever the backend."""
    require("cpp")


@pytest.fixture
def one_and_two_threads() -> Iterator[list[int]]:
    """Restores the number of threads after a test that sets it."""
    before = torch.get_num_threads()
    yield [1, 2]
    torch.set_num_threads(before)
