"""diffusers' AutoencoderKL, the autoencoder of latent diffusion, trained on its ELBO.

    python examples/diffusers_kl.py --epochs 3

A small one from scratch, on digits enlarged to 16x16. Prints the loss and its parts, in nats per
digit.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from sklearn.datasets import load_digits
from torch import Tensor

import fastvae


def negative_elbo(
    vae: AutoencoderKL, criterion: fastvae.ELBOLoss, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [B, C, H, W] in [-1, 1] -> loss, ln p(x|z) and KL, means over the batch.

    The posterior's logvar is already clamped to [-30, 20], as diffusers does it. The KL is summed
    over all latent dimensions but the batch; for the latents of a video, [B, C, T, H, W], as well.
    """
    posterior = vae.encode(x).latent_dist
    z, kl = fastvae.rsample_kl(posterior.mean, posterior.logvar)
    recon = vae.decode(z).sample
    loss, log_likelihood, mean_kl = criterion.terms(recon, x, kl=kl)
    return loss, log_likelihood, mean_kl


def make_vae() -> AutoencoderKL:
    """16x16 grey values -> 4 channels of 4x4 latents."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--digits", type=int, default=1797, help="how many to train on")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = parse(argv)
    torch.manual_seed(args.seed)
    images = torch.tensor(load_digits().images[: args.digits, None], dtype=torch.float32) / 8 - 1
    images = F.interpolate(images, scale_factor=2, mode="bilinear")
    vae = make_vae()
    # inplace_backward: the gradient overwrites the reconstruction, as the decoder ends in a
    # convolution, which doesn't need its output again.
    criterion = fastvae.ELBOLoss(fastvae.likelihoods.Gaussian(scale=0.2), inplace_backward=True)
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)

    history = []
    for epoch in range(1, args.epochs + 1):
        total = torch.zeros(3)
        for rows in torch.randperm(len(images)).split(args.batch_size):
            terms = negative_elbo(vae, criterion, images[rows])
            optimizer.zero_grad()
            terms[0].backward()
            optimizer.step()
            total += torch.stack(terms).detach() * (len(rows) / len(images))
        loss, log_likelihood, kl = total.tolist()
        print(
            f"{epoch:4d}  loss {loss:9.3f} = {-log_likelihood:9.3f} reconstruction + {kl:8.3f} KL"
        )
        history.append(loss)
    return {"first_loss": history[0], "loss": history[-1], "kl": kl}


if __name__ == "__main__":
    main()
