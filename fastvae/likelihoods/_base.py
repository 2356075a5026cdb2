"""What every likelihood family is."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn


def number(name: str, value: object, or_else: str = "") -> float:
    """A number, numpy's too, as a float; raises TypeError for anything else. inf for 10**400."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number{or_else}, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def refuse_tracked(name: str, parameter: Tensor) -> None:
    """Raises for one of Opacus' parameters: its hooks see calls of layers alone, and would leave
    the loss's own parameters without a per-sample gradient, silently."""
    if hasattr(parameter, "grad_sample"):
        raise TypeError(
            f"Opacus tracks the parameter {name}, of which no per-sample gradient can be made: "
            "leave the criterion out of its GradSampleModule, or let the decoder give it"
        )


#: A formula by the name that csrc/formulas/ gives it, in differentiable PyTorch: (options, x,
#: *params) -> ln p per element, in nats; its tensors are float32 or float64. What eager runs, and
#: what double backward and torch.func see of the kernels.
Formula = Callable[..., Tensor]
formulas: dict[str, Formula] = {}
#: Those of sites: x is [B, *event], and each parameter has a dimension more, an element's classes
#: or components: [rows…, planes, *event].
sites: set[str] = set()


def formula(function: Formula) -> Formula:
    """Gives it to the table under its own name."""
    formulas[function.__name__] = function
    return function


def site_formula(function: Formula) -> Formula:
    """The same for one of sites."""
    sites.add(function.__name__)
    return formula(function)


class Likelihood(nn.Module):
    """A reconstruction likelihood p(x | parameters), factorized over elements.

    A family is one subclass beside its formula in ``csrc/formulas/``, and that formula once more in
    plain PyTorch (`formula`, or `site_formula`). It says which parameters the decoder gives, and
    makes of them those that the formula takes.
    """

    family: str  # the formula's name in every backend
    param_names: tuple[str, ...]  # what `recon` holds, in order
    formula_names: tuple[str, ...]  # what the formula takes; `param_names` where it is left out
    #: Of x and the formula's parameters, those that may not be any number.
    domains: ClassVar[dict[str, str]] = {}

    @property
    def options(self) -> Sequence[float]:
        """Constants of the formula, in its order."""
        return ()

    @property
    def as_given(self) -> bool:
        """Whether the formula takes recon and x as they come."""
        return self.formula_names is self.param_names

    def params(self, recon: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        """The formula's parameters: the decoder's, and those the likelihood itself holds."""
        return recon

    def kept(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask, and what of x the likelihood itself leaves out."""
        return mask

    def log_prob(self, x: Tensor, *params: Tensor) -> Tensor:
        """ln p per element (nats), in differentiable PyTorch, of the formula's parameters; float32
        or float64."""
        return formulas[self.family](self.options, x, *params)

    def sample_inputs(
        self, shape: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A typical (x, recon) of this family in float32, for tests and benchmarks."""
        raise NotImplementedError
