"""The table of benchmarks/requirements.py: measured here, printed at the end."""

import importlib.util
import math

import pytest

from benchmarks.requirements import REQUIREMENTS, Requirement, outcome

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.mark.requirement
@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_requirement(requirement: Requirement, pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("device", "cpu") != "cpu":
        pytest.skip("stated for the CPU")
    if "Pyro" in requirement.name and importlib.util.find_spec("pyro") is None:
        pytest.skip("Pyro is not installed: pip install pyro-ppl")
    ratio = outcome(requirement)
    assert math.isfinite(ratio) and ratio > 0
    # The targets are for two cores with AVX-512. One that is missed is reported as such.
    if requirement.must is not None and not requirement.met(ratio, requirement.must):
        pytest.xfail(f"measured {ratio:.2f}, must be {requirement.must:g}")
