"""What is timed: one declarative table a device. Everything else here enumerates `CASES`.

A likelihood gets its own case by being in `fastvae.likelihoods.registry`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import fastvae
from benchmarks import plain


class Target(NamedTuple):
    """Where a problem's tensors are, and what they are of."""

    device: str
    dtype: torch.dtype


CPU = Target("cpu", torch.float32)
CUDA = Target("cuda", torch.float32)
CUDA_HALF = Target("cuda", torch.bfloat16)  # float16 can't hold eager's sum over a batch
BITS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Shape(NamedTuple):
    batch: int
    latents: int
    pixels: int


SMALL = Shape(128, 20, 784)  # an MNIST batch: overhead
MIDDLE = Shape(512, 64, 3072)  # a CIFAR batch: arithmetic, in cache
LARGE = Shape(2048, 128, 12288)  # 64x64 RGB: memory
HUGE = Shape(8192, 256, 12288)  # 400 MB a tensor, beyond any device's cache
MANY = Shape(65536, 256, 0)  # the same for latents: 67 MB


class Problem(NamedTuple):
    """Tensors to run on, and what comes back into the outputs from the rest of the model."""

    inputs: dict[str, Tensor]  # by name; those that require a gradient get one
    upstream: tuple[Tensor | None, ...]  # one per output; None: the scalar loss itself
    # The least that any implementation must read and write, in elements:
    forward: int  # to get the outputs
    step: int  # to get the outputs and the gradients in one go

    @property
    def traffic(self) -> dict[str, int]:
        """The same in bytes, by phase: a contender may choose how to split the step."""
        itemsize = next(iter(self.inputs.values())).element_size()
        return {"no_grad": self.forward * itemsize, "step": self.step * itemsize}


Contender = Callable[..., tuple[Tensor, ...]]  # called with the inputs by name


@dataclass(frozen=True)
class Case:
    op: str
    family: str
    shape: Shape
    target: Target
    problem: Callable[[Shape, Target], Problem]
    fastvae: Contender
    eager: Contender  # takes eps=None too where `sampled`
    compiled: bool = True  # time torch.compile of `eager` as well
    sampled: bool = False  # the first output is z, drawn from N(mu, exp(logvar))

    @property
    def name(self) -> str:
        device, bits = self.target.device, BITS[self.target.dtype]
        rows, columns = self.shape.batch, self.shape.pixels or self.shape.latents
        return f"{self.op}[{self.family}-{device}-{bits}-{rows}x{columns}]"

    @property
    def contenders(self) -> tuple[str, ...]:
        return ("fastvae", "eager", "torch.compile") if self.compiled else ("fastvae", "eager")

    def run(self, contender: str) -> Contender:
        if contender == "torch.compile":
            return torch.compile(self.eager, dynamic=False)  # the best code for this shape
        return self.fastvae if contender == "fastvae" else self.eager


def normal(target: Target, *size: int, scale: float = 1.0) -> Tensor:
    return torch.randn(size, dtype=target.dtype, device=target.device) * scale


def uniform(target: Target, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.empty(size, dtype=target.dtype, device=target.device).uniform_(low, high)


def latents(shape: Shape, target: Target) -> dict[str, Tensor]:
    size = shape.batch, shape.latents
    return {name: normal(target, *size).requires_grad_() for name in ("mu", "logvar")}


def step_problem(shape: Shape, target: Target) -> Problem:
    """The decoder is left out: logits are a leaf, and z gets the gradient a decoder would send."""
    rows = shape.batch, shape.pixels
    logits = normal(target, *rows, scale=3.0).requires_grad_()
    inputs = {"logits": logits, "x": uniform(target, *rows)}
    upstream = normal(target, shape.batch, shape.latents, scale=1e-2), None
    n, m = shape.batch * shape.pixels, shape.batch * shape.latents
    # logits, x; d_logits. mu, logvar, z; again mu, logvar, and d_z, d_mu, d_logvar.
    return Problem(inputs | latents(shape, target), upstream, 2 * n + 3 * m, 3 * n + 8 * m)


def latent_problem(outputs: str, forward: int, step: int) -> Callable[[Shape, Target], Problem]:
    def problem(shape: Shape, target: Target) -> Problem:
        m = shape.batch * shape.latents
        z = normal(target, shape.batch, shape.latents)
        gradients = {"z": z, "kl": mean_gradient(shape, target, +1)}
        upstream = tuple(gradients[name] for name in outputs.split())
        return Problem(latents(shape, target), upstream, forward * m, step * m)

    return problem


def mean_gradient(shape: Shape, target: Target, sign: int) -> Tensor:
    """What the mean of the negative ELBO sends to a value per sample."""
    value = sign / shape.batch
    return torch.full((shape.batch,), value, dtype=target.dtype, device=target.device)


def log_likelihood_case(family: str, shape: Shape, target: Target) -> Case:
    likelihood = fastvae.likelihoods.get(family)
    # A family without a formula in plain.py is compared with its own eager backend.
    formula = plain.LOG_LIKELIHOODS.get(family)

    def problem(shape: Shape, target: Target) -> Problem:
        size = shape.batch, shape.pixels
        x, recon = likelihood.sample_inputs(size)
        inputs = dict(zip(("x", *likelihood.param_names), (x, *recon), strict=True))
        inputs = {k: t.to(*target).requires_grad_(k != "x") for k, t in inputs.items()}
        params = sum(t.numel() for t in recon)
        upstream = (mean_gradient(shape, target, -1),)
        return Problem(inputs, upstream, x.numel() + params, x.numel() + 2 * params)

    def run(x: Tensor, backend: str = "auto", **parameters: Tensor) -> tuple[Tensor]:
        recon = tuple(parameters.values())
        return (fastvae.log_likelihood(recon, x, likelihood, backend=backend),)

    def eager(x: Tensor, **parameters: Tensor) -> tuple[Tensor]:
        return (formula(x, **parameters),) if formula else run(x, "eager", **parameters)

    return Case("log_likelihood", family, shape, target, problem, run, eager)


def fused_step() -> Contender:
    criterion = fastvae.ELBOLoss(likelihood="bernoulli")

    def step(logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        z, kl = fastvae.rsample_kl(mu, logvar)
        return z, criterion(logits, x, kl=kl)

    return step


def step_case(shape: Shape, target: Target) -> Case:
    run = fused_step()
    return Case("elbo", "bernoulli", shape, target, step_problem, run, plain.elbo, sampled=True)


def latent_cases(shape: Shape, target: Target) -> list[Case]:
    shape = shape._replace(pixels=0)
    # outputs, then the tensors of mu's size that pass by: in the forward, in the whole step
    table: dict[str, tuple[str, int, int, Contender]] = {
        "rsample": ("z", 3, 7, lambda **inputs: (fastvae.rsample(**inputs),)),
        "rsample_kl": ("z kl", 3, 8, lambda **inputs: fastvae.rsample_kl(**inputs)),
        "kl_divergence": ("kl", 2, 6, lambda **inputs: (fastvae.kl_divergence(**inputs),)),
    }
    return [
        Case(
            op,
            "normal",
            shape,
            target,
            latent_problem(outputs, forward, step),
            run,
            getattr(plain, op),
            sampled="z" in outputs,
        )
        for op, (outputs, forward, step, run) in table.items()
    ]


def everywhere(target: Target) -> list[Case]:
    return [
        *(step_case(shape, target) for shape in (SMALL, MIDDLE, LARGE)),
        *(log_likelihood_case(name, MIDDLE, target) for name in fastvae.likelihoods.registry),
        *latent_cases(SMALL, target),
        *latent_cases(LARGE, target),
    ]


CASES: dict[str, list[Case]] = {  # by device
    "cpu": everywhere(CPU),
    "cuda": [
        *everywhere(CUDA),
        step_case(HUGE, CUDA),
        *(step_case(shape, CUDA_HALF) for shape in (MIDDLE, LARGE, HUGE)),
        *(log_likelihood_case(name, LARGE, CUDA) for name in fastvae.likelihoods.registry),
        *latent_cases(MANY, CUDA),
    ],
}
