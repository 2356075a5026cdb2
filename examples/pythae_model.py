"""A pythae model whose forward pass is fastvae's, trained by pythae's own pipeline.

    python examples/pythae_model.py --reconstruction-loss bce --epochs 5

Everything else of pythae (trainers, samplers, checkpoints) works with it as with pythae's VAE.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from pythae.data.datasets import DatasetOutput
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.pipelines import TrainingPipeline
from pythae.trainers import BaseTrainerConfig
from sklearn.datasets import load_digits

import fastvae
from fastvae.likelihoods import BernoulliProbs, Gaussian


class FastVAE(VAE):
    """pythae's VAE, the same losses: summed over pixels and latents, averaged over the batch.

    Its decoders end in a sigmoid, so "bce" takes probabilities; its "mse" is half the squared
    error, the Gaussian with scale 1 without its constant.
    """

    def __init__(self, model_config: VAEConfig, encoder: Any = None, decoder: Any = None) -> None:
        super().__init__(model_config, encoder, decoder)
        bce = model_config.reconstruction_loss == "bce"
        self.criterion = fastvae.ELBOLoss(BernoulliProbs() if bce else Gaussian(normalized=False))

    def forward(self, inputs: DatasetOutput, **kwargs: Any) -> ModelOutput:
        x = inputs["data"]
        q = self.encoder(x)
        z, kl = fastvae.rsample_kl(q.embedding, q.log_covariance)
        recon_x = self.decoder(z).reconstruction
        loss, log_likelihood, kl = self.criterion.terms(recon_x.reshape(x.shape), x, kl=kl)
        return ModelOutput(loss=loss, recon_loss=-log_likelihood, reg_loss=kl, recon_x=recon_x, z=z)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--reconstruction-loss", choices=["bce", "mse"], default="bce")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="pythae-digits", help="pythae's folder for the model")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = parse(argv)
    torch.manual_seed(args.seed)
    digits = torch.tensor(load_digits().images[:, None], dtype=torch.float32) / 16
    model = FastVAE(
        VAEConfig(
            input_dim=(1, 8, 8),
            latent_dim=args.latents,
            reconstruction_loss=args.reconstruction_loss,
        )
    )
    before = model(DatasetOutput(data=digits)).loss.item()
    pipeline = TrainingPipeline(
        model,
        BaseTrainerConfig(
            output_dir=args.out, num_epochs=args.epochs, learning_rate=1e-3, seed=args.seed
        ),
    )
    pipeline(digits)
    loaded = FastVAE.load_from_folder(f"{pipeline.trainer.training_dir}/final_model")
    after = loaded(DatasetOutput(data=digits)).loss.item()
    print(f"loss before {before:8.3f}, after {after:8.3f} nats per digit")
    return {"first_loss": before, "loss": after}


if __name__ == "__main__":
    main()
