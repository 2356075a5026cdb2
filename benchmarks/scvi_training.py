"""Whole epochs of scvi.model.SCVI, with and without `fastvae.integrations.scvi.accelerate`.

    python -m benchmarks.scvi_training [--genes 20000] [--likelihoods nb zinb]

Batches of 128 cells, synthetic counts, most of them zero; in turns, a fresh model each. Needs
scvi-tools.
"""

import argparse
import resource
import statistics
import time
import warnings

import anndata
import numpy as np
import scvi
import torch

import fastvae
import fastvae.integrations.scvi

ROUNDS = 3


def train(cells: anndata.AnnData, likelihood: str, accelerated: bool, epochs: int) -> float:
    """Seconds an epoch."""
    scvi.settings.seed = 0
    model = scvi.model.SCVI(cells, gene_likelihood=likelihood)
    if accelerated:
        fastvae.integrations.scvi.accelerate(model)
    start = time.perf_counter()
    model.train(
        max_epochs=epochs, batch_size=128, accelerator="cpu", train_size=1.0,
        enable_progress_bar=False, logger=False,
    )  # fmt: skip
    return (time.perf_counter() - start) / epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--genes", type=int, default=20000)
    parser.add_argument("--cells", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--likelihoods", nargs="+", default=["nb", "zinb", "poisson"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.3, 0.6, (options.cells, options.genes))
    cells = anndata.AnnData(rng.poisson(rate).astype(np.float32))
    scvi.model.SCVI.setup_anndata(cells)
    print(f"scvi-tools {scvi.__version__}, torch {torch.__version__}, "
          f"{fastvae.backends()['cpp'].detail}, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"[128, {options.genes}], {np.mean(cells.X == 0):.0%} zeros; seconds an epoch")
    for likelihood in options.likelihoods:
        train(cells, likelihood, True, 1)
        train(cells, likelihood, False, 1)
        pairs = [
            [train(cells, likelihood, on, options.epochs) for on in (False, True)]
            for _ in range(ROUNDS)
        ]
        before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for b, a in pairs)
        print(f"{likelihood:8} {before:7.2f} -> {after:6.2f}   {ratio:.2f} x", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak of the process: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
