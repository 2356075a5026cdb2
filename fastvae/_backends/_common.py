"""What the backends share."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastvae.likelihoods import Likelihood


def minor(version: str) -> tuple[int, ...]:
    """Of "2.13.0+cpu" that is (2, 13)."""
    return tuple(int(number) for number in version.split(".")[:2])


class Backend(NamedTuple):
    """Whether a backend can serve, and what it is or why it can't."""

    available: bool
    detail: str


class Terms(NamedTuple):
    """The negative ELBO and its parts, reduced alike: loss = beta · kl − log_likelihood (nats)."""

    loss: Tensor
    log_likelihood: Tensor
    kl: Tensor


Prior = tuple[Tensor, Tensor]
Beta = float | Tensor  # a tensor has one element


class Ops(Protocol):
    """The functions that every backend module has. Arguments are validated by functional.py."""

    def status(self) -> Backend: ...
    def draw_seed(self, mu: Tensor, generator: torch.Generator | None) -> Tensor: ...
    def rsample(
        self,
        mu: Tensor,
        logvar: Tensor,
        seed: Tensor,
        num_samples: int | None,
        sample_offset: int,
        sample_index: Tensor | None,
    ) -> Tensor: ...
    def rsample_kl(
        self,
        mu: Tensor,
        logvar: Tensor,
        seed: Tensor,
        num_samples: int | None,
        sample_offset: int,
        sample_index: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...
    def kl_divergence(
        self, mu: Tensor, logvar: Tensor, prior: Prior | None, mask: Tensor | None
    ) -> Tensor: ...
    def log_likelihood(
        self, x: Tensor, params: tuple[Tensor, ...], likelihood: Likelihood, mask: Tensor | None
    ) -> Tensor: ...
    def elbo(
        self,
        x: Tensor,
        params: tuple[Tensor, ...],
        kl: Tensor,
        likelihood: Likelihood,
        mask: Tensor | None,
        weight: Tensor | None,
        beta: Beta,
        reduction: str,
        inplace_backward: bool,
    ) -> tuple[Terms, Tensor]:  # and ln p of each row, [B] or [K, B], detached
        ...
    def count_nonfinite(
        self, state: Tensor, rows: Tensor, kl: Tensor, weight: Tensor | None
    ) -> None: ...


def in_transform() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp, …) is active."""
    functorch = torch._C._functorch
    # Not `is not None`, which torch.compile takes to be true of whatever this returns.
    return isinstance(functorch.peek_interpreter_stack(), functorch.CInterpreter)


def readable(t: Tensor) -> bool:
    """Whether values may be checked: a read from another device would stall it, and a traced
    tensor has none yet."""
    if t.device.type != "cpu" or torch.compiler.is_compiling() or in_transform():
        return False
    # A FakeTensor has no values, as other subclasses of that kind; those that only see calls do.
    return type(t).__torch_dispatch__ is Tensor.__torch_dispatch__


def draw_seed(mu: Tensor, generator: torch.Generator | None) -> Tensor:
    """One int64 from torch's generator, on mu's device; the noise is a function of it."""
    return torch.randint(2**63 - 1, (1,), device=mu.device, generator=generator)
