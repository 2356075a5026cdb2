"""rsample_kl alone by the number of latents: what noise costs where rows are no multiple of 64.

    python -m benchmarks.samplers [--device cuda] [--elements 16777216] [--out FILE.json]

Picoseconds per latent element, forward and backward, in float32 and bfloat16, of fastvae's backends
and of the tutorials' lines (randn_like, exp, the KL's sum) in PyTorch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fastvae
from benchmarks import gpu, plain

LATENTS = (20, 32, 64, 100, 128)
ROUNDS = 7


def step(call: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor], dz: Tensor) -> None:
    z, kl = call(*leaves)
    torch.autograd.grad([z, kl], leaves, [dz, torch.ones_like(kl)])


def on_cpu(function: Callable[[], object]) -> float:
    function()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--elements", type=int, default=2**24)
    parser.add_argument("--out", type=Path, help="the figures as JSON")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    names = ("cuda", "triton") if cuda else ("cpp",)
    ours = [name for name in names if fastvae.backends()[name].available]
    duration = gpu.duration if cuda else on_cpu
    calls: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        name: partial(fastvae.rsample_kl, backend=name) for name in ours
    }
    calls["eager"] = plain.rsample_kl
    print(torch.cuda.get_device_name() if cuda else fastvae.backends()["cpp"].detail)
    heads = [f"{name} {way}" for name in calls for way in ("forward", "both")]
    print(f"{'ps an element':24}" + "".join(f"{head:>16}" for head in heads))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for latents in LATENTS:
            batch = options.elements // latents
            mu, logvar, dz = torch.randn(3, batch, latents, device=options.device).to(dtype)
            leaves = [mu.requires_grad_(), logvar.requires_grad_()]
            times = {}
            for name, call in calls.items():
                forward = duration(partial(call, mu.detach(), logvar.detach()))
                both = duration(partial(step, call, leaves, dz))
                times[name] = [t / mu.numel() * 1e12 for t in (forward, both)]
            kind = str(dtype).removeprefix("torch.")
            rows.append({"latents": latents, "dtype": kind, "picoseconds": times})
            cells = "".join(f"{t:16.1f}" for pair in times.values() for t in pair)
            print(f"{latents:4} latents, {kind:11}{cells}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
