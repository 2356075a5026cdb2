"""What the CPU backend is meant to reach, each as a ratio measured in one run against a peer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal
from torch.distributions import kl_divergence as kl_of

import fastvae
from benchmarks import runner
from benchmarks.cases import (
    CASES,
    CPU,
    LARGE,
    MIDDLE,
    SMALL,
    Case,
    Problem,
    Shape,
    Target,
    step_case,
)
from benchmarks.runner import Measurement, interleave

HALF = Target("cpu", torch.bfloat16)
SIZES = {"128x20x784": SMALL, "512x64x3072": MIDDLE, "2048x128x12288": LARGE}


@dataclass(frozen=True)
class Requirement:
    name: str
    must: float | None  # None: a peer to know, nothing to reach
    aim: float | None
    ratio: Callable[[], float]
    at_most: bool = False  # a time or a size over a peer's, instead of times faster

    def met(self, ratio: float, bound: float) -> bool:
        return ratio <= bound if self.at_most else ratio >= bound


def timed(op: str, shape: Shape) -> Measurement:
    """The measurement that the table of all cases uses, too."""
    (case,) = (c for c in CASES["cpu"] if c.op == op and c.shape[:2] == shape[:2])
    return runner.measure(case)


def speedup(shape: Shape, over: str) -> float:
    return timed("elbo", shape).speedup(over)


def latent_speedup() -> float:
    return timed("rsample_kl", SMALL).speedup("eager")


def kernel(family: str) -> float:
    """Value and gradient into memory already there, over torch.add of the same three tensors."""
    x, recon = torch.rand(LARGE.batch, LARGE.pixels), torch.randn(LARGE.batch, LARGE.pixels)
    out, options = torch.empty_like(x), fastvae.likelihoods.get(family).options
    needs = [False, True, False, False, False]

    def ours() -> None:
        torch.ops.fastvae.row_forward(x, [recon], family, options, None, None, 1.0, needs)

    return median(interleave(lambda: torch.add(x, recon, out=out), ours))


def normals(threads: int) -> float:
    seed, before = torch.tensor([1]), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return median(
            interleave(
                lambda: torch.ops.fastvae.noise(seed, [65536, 64], 1, 0),
                lambda: torch.randn(65536, 64),
            )
        )
    finally:
        torch.set_num_threads(before)


def extra_memory() -> float:
    gradient = 4 * LARGE.batch * LARGE.pixels
    return timed("elbo", LARGE).peak["fastvae"] / gradient


def half_over_single(shape: Shape) -> float:
    """The step in bfloat16, over float32."""
    steps = []
    for target in (CPU, HALF):
        case = step_case(shape, target)
        problem = case.problem(shape, target)
        steps.append(partial(run_step, case, problem))
    return median(interleave(*steps))


def run_step(case: Case, problem: Problem) -> object:
    return runner.backward(case.fastvae(**problem.inputs), problem)


def over_distributions(shape: Shape) -> float:
    """As torch.distributions' documentation has it."""

    def head(logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        posterior = Independent(Normal(mu, (0.5 * logvar).exp(), validate_args=False), 1)
        prior = Independent(Normal(torch.zeros_like(mu), torch.ones_like(mu)), 1)
        likelihood = Independent(Bernoulli(logits=logits, validate_args=False), 1)
        z = posterior.rsample()
        return z, (kl_of(posterior, prior) - likelihood.log_prob(x)).mean()

    return over(shape, head)


def over_pyro(shape: Shape) -> float:
    """Pyro's TraceMeanField_ELBO on the same guide and model."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import TraceMeanField_ELBO

    pyro.enable_validation(False)

    def model(logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> None:
        with pyro.plate("batch", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(mu), torch.ones_like(mu)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> None:
        with pyro.plate("batch", len(x)):
            pyro.sample("z", dist.Normal(mu, (0.5 * logvar).exp()).to_event(1))

    elbo = TraceMeanField_ELBO()

    def head(logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[None, Tensor]:
        loss = elbo.differentiable_loss(model, guide, logits, x, mu, logvar)
        return None, loss / len(x)

    return over(shape, head)


def over(shape: Shape, head: Callable[..., tuple[Tensor | None, Tensor]]) -> float:
    """How many times faster than `head` the step is, loss and gradients by the loss alone."""
    case = step_case(shape, CPU)
    inputs = case.problem(shape, CPU).inputs
    wanted = [t for t in inputs.values() if t.requires_grad]

    def gradients(run: Callable[..., tuple[Tensor | None, ...]]) -> tuple[Tensor, ...]:
        loss = run(**inputs)[1]
        assert loss is not None
        return torch.autograd.grad(loss, wanted)

    for ours, theirs in zip(gradients(case.fastvae), gradients(head), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    return median(interleave(lambda: gradients(case.fastvae), lambda: gradients(head)))


MUST = {SMALL: (5, 8, 5, 8), MIDDLE: (8, 12, 4, 7), LARGE: (6, 12, 3, 6)}
REQUIREMENTS = [
    *(
        Requirement(f"step {name}: x {who}", must, aim, partial(speedup, shape, who))
        for name, shape in SIZES.items()
        for who, (must, aim) in zip(
            ("eager", "torch.compile"), (MUST[shape][:2], MUST[shape][2:]), strict=True
        )
    ),
    Requirement(
        "bernoulli kernel 2048x12288 / torch.add", 1.3, 1.1, partial(kernel, "bernoulli"), True
    ),
    Requirement(
        "gaussian kernel 2048x12288 / torch.add", 1.15, 1.05, partial(kernel, "gaussian"), True
    ),
    Requirement("4M normals, 2 threads: x torch.randn", 5, 8, partial(normals, 2)),
    Requirement("4M normals, 1 thread: x torch.randn", 3, 5, partial(normals, 1)),
    Requirement("rsample_kl 128x20, fwd + bwd: x eager", 4.4, 9, latent_speedup),
    Requirement("peak memory of the large step / gradient", 1.05, 1.0, extra_memory, True),
    Requirement("bfloat16 / float32, large step", 1.0, 0.5, partial(half_over_single, LARGE), True),
    *(
        Requirement(
            f"step {name}: x torch.distributions", None, None, partial(over_distributions, shape)
        )
        for name, shape in SIZES.items()
    ),
    *(
        Requirement(f"step {name}: x Pyro", None, None, partial(over_pyro, shape))
        for name, shape in SIZES.items()
    ),
]

OUTCOMES: dict[str, tuple[Requirement, float]] = {}


def outcome(requirement: Requirement) -> float:
    ratio = requirement.ratio()
    OUTCOMES[requirement.name] = requirement, ratio
    return ratio


def lines() -> list[str]:
    """The table of what was asked for and what came."""
    text = [f"{'requirement':<44}{'measured':>9}{'must':>8}{'aim':>8}"]
    for requirement, ratio in OUTCOMES.values():
        must, aim = requirement.must, requirement.aim
        line = f"{requirement.name:<44}{ratio:9.2f}"
        if must is not None and aim is not None:
            sign = "≤" if requirement.at_most else "≥"
            verdict = "aim met" if requirement.met(ratio, aim) else "met"
            verdict = verdict if requirement.met(ratio, must) else "missed"
            line += f"{sign + f'{must:g}':>8}{sign + f'{aim:g}':>8}  {verdict}"
        text.append(line)
    return text
