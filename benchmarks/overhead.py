"""What a small step costs besides arithmetic: `python -m benchmarks.overhead`.

Counts, which unlike times are the same in every run: operators that went through the dispatcher,
nodes of the autograd graph, and allocations, in one step of batch 128, 20 latents, 784 pixels.
"""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import runner
from benchmarks.cases import CPU, SMALL, Contender, Problem, step_case


def counts(run: Contender, problem: Problem) -> dict[str, int]:
    for _ in range(3):
        runner.backward(run(**problem.inputs), problem)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        runner.backward(run(**problem.inputs), problem)
    events: Any = prof.events()
    names = [e.name for e in events]
    raw: Any = prof.profiler
    memory = [e for e in raw.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    outputs = run(**problem.inputs)
    return {
        "operators": sum(n.startswith(("aten::", "fastvae::")) for n in names),
        "graph nodes": nodes(outputs),
        "allocations": len(memory),
    }


def nodes(outputs: tuple[torch.Tensor, ...]) -> int:
    """The autograd nodes that a backward from the outputs passes, leaves left out."""
    seen: set[Any] = set()
    waiting = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [n for n, _ in node.next_functions if n is not None]
    return sum("AccumulateGrad" not in n.name() for n in seen)


def main() -> None:
    case = step_case(SMALL, CPU)
    problem = case.problem(SMALL, CPU)
    table = {name: counts(case.run(name), problem) for name in ("fastvae", "eager")}
    print(f"{'':<12}{'fastvae':>9}{'eager':>9}")
    for what in table["fastvae"]:
        print(f"{what:<12}{table['fastvae'][what]:>9}{table['eager'][what]:>9}")


if __name__ == "__main__":
    main()
