"""scVI with fastvae for its latent part: the draw of z and the KL.

    python examples/scvi_module.py --epochs 20

The counts' likelihood stays scvi-tools' own (fastvae.integrations.scvi fuses that). Prints −ELBO
before and after training, and the importance-sampled ln p(x), in nats per cell.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import scvi
import torch
from scvi import REGISTRY_KEYS
from scvi.module import VAE
from scvi.module.base import LossOutput, auto_move_data
from torch import Tensor
from torch.distributions import kl_divergence

import fastvae


class FastVAE(VAE):
    """scVI's module, with the same losses. Its encoders give torch Normals."""

    @auto_move_data
    def inference(self, *args: Any, n_samples: int = 1, **kwargs: Any) -> dict[str, Any]:
        """Draws z anew: scvi's encoder returns it drawn already, but without its KL."""
        outputs = super().inference(*args, n_samples=n_samples, **kwargs)
        q = fastvae.from_distribution(outputs["qz"])
        num_samples = n_samples if n_samples > 1 else None
        z, kl = fastvae.rsample_kl(q.mu, q.logvar, num_samples=num_samples)
        outputs["z"] = self.z_encoder.z_transformation(z)
        outputs["kl"] = kl
        return outputs

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        kl_weight: float | Tensor = 1.0,
    ) -> LossOutput:
        """kl_weight is scvi's warm-up; the KL of the library size has none."""
        kl, ql = inference_outputs["kl"], inference_outputs["ql"]
        kl_library = torch.zeros_like(kl)
        if ql is not None:
            kl_library = kl_divergence(fastvae.from_distribution(ql), generative_outputs["pl"])
        nll = -generative_outputs["px"].log_prob(tensors[REGISTRY_KEYS.X_KEY]).sum(-1)
        return LossOutput(
            loss=(nll + kl_weight * kl + kl_library).mean(),
            reconstruction_loss=nll,
            kl_local={"kl_divergence_z": kl, "kl_divergence_l": kl_library},
        )


class FastSCVI(scvi.model.SCVI):
    _module_cls = FastVAE


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--cells", type=int, default=200, help="per batch, of two")
    parser.add_argument("--samples", type=int, default=100, help="per cell, to estimate ln p(x)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = parse(argv)
    np.random.seed(args.seed)  # what synthetic_iid draws from
    torch.manual_seed(args.seed)
    cells = scvi.data.synthetic_iid(batch_size=args.cells)
    FastSCVI.setup_anndata(cells, batch_key="batch")
    model = FastSCVI(cells, gene_likelihood="nb")
    before = -float(model.get_elbo())
    model.train(max_epochs=args.epochs, accelerator="cpu", enable_progress_bar=False)
    after = -float(model.get_elbo())
    log_px = model.get_marginal_ll(n_mc_samples=args.samples, n_mc_samples_per_pass=10)
    print(f"-ELBO before {before:8.3f}, after {after:8.3f} nats per cell; ln p(x) {log_px:9.3f}")
    return {"first_loss": before, "loss": after, "log_px": log_px}


if __name__ == "__main__":
    main()
