"""The categorical likelihood over classes. Formula: csrc/formulas/categorical.h."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastvae.likelihoods._base import Likelihood, number, site_formula


@site_formula
def categorical(options: Sequence[float], x: Tensor, logits: Tensor) -> Tensor:
    """ln p(x | l) = l_x − ln Σ_c e^l_c; of x [B, *event] and l [rows…, classes, *event]"""
    (smoothing,) = options
    dim = -x.dim()
    log_p, index = logits.log_softmax(dim), x.detach().long().unsqueeze(1)
    if logits.dim() > index.dim():  # one x for all samples
        index = index.unsqueeze(0)
    chosen = torch.take_along_dim(log_p, index, dim).squeeze(dim)
    if smoothing == 0:  # a logit may be −∞
        return chosen
    return (1 - smoothing) * chosen + smoothing * log_p.mean(dim)


class Categorical(Likelihood):
    """ln p(x | l) = l_x − ln Σ_c e^l_c, from the decoder's logits l of K classes.

    Equals ``-cross_entropy``, summed over the event dimensions. recon has one dimension more than
    x, [B, K, *event] as ``cross_entropy`` has it, or [S, B, K, *event] with S samples; x holds the
    index of each element's class in any floating or integer dtype, and no gradient flows to it.

    Args:
        dim: where recon has its classes, if not in dimension 1: counted from the end (-1 for
            [B, *event, K]), or from the front, the batch being dimension 0 whether or not there
            are samples before it. A view is made of it, never a copy.
        label_smoothing: ε in [0, 1]; (1 − ε) ln p(x) + ε times the mean of ln p over the classes
            (Szegedy et al. 2016, section 7), as ``cross_entropy`` has it.
        ignore_index: elements of x that hold this number are left out, as by a mask.

    Raises:
        ValueError: label_smoothing is not in [0, 1]; in a call, logits whose shape doesn't fit.
        TypeError: dim or ignore_index is not an int.
    """

    family = "categorical"
    param_names = formula_names = ("logits",)
    domains: ClassVar[dict[str, str]] = {"x": "index"}

    def __init__(
        self, dim: int = 1, *, label_smoothing: float = 0.0, ignore_index: int | None = None
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("ignore_index", ignore_index or 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        self.dim = dim
        self.ignore_index = ignore_index
        self.label_smoothing = number("label_smoothing", label_smoothing)
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")

    @property
    def options(self) -> Sequence[float]:
        return (self.label_smoothing,)

    @property
    def as_given(self) -> bool:
        return self.dim == 1 and self.ignore_index is None

    def params(self, recon: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        """The classes moved to where the formula has them: behind the batch."""
        (logits,) = recon
        samples = logits.dim() - x.dim() - 1
        dim = self.dim + (logits.dim() if self.dim < 0 else samples)
        fits = samples in (0, 1) and samples < dim < logits.dim() and logits.shape[dim] > 0
        if not fits or (*logits.shape[samples:dim], *logits.shape[dim + 1 :]) != x.shape:
            raise ValueError(
                f"logits must have x's shape {list(x.shape)} and the classes in dimension "
                f"{self.dim}, behind a sample dimension if wanted, got {list(logits.shape)}"
            )
        # A view costs autograd a node.
        return (logits if dim == samples + 1 else logits.movedim(dim, samples + 1),)

    def kept(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        if self.ignore_index is None:
            return mask
        kept = x != self.ignore_index
        return kept if mask is None else kept & mask

    def sample_inputs(
        self, shape: Sequence[int], generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Of ten classes."""
        batch, *event = shape
        x = torch.randint(10, tuple(shape), generator=generator)
        logits = torch.randn(batch, 10, *event, generator=generator)
        return x, (2 * logits.movedim(1, self.dim),)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, label_smoothing={self.label_smoothing}, "
            f"ignore_index={self.ignore_index}"
        )
