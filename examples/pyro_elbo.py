"""A Pyro ELBO that fastvae computes: one Normal latent site, one Bernoulli or Normal observation.

    python examples/pyro_elbo.py --epochs 5

Takes the place of TraceMeanField_ELBO in SVI: the same value and gradients. Pyro still draws z.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI
from pyro.poutine.util import prune_subsample_sites
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import kl_divergence

import fastvae


class FastELBO(ELBO):
    """Sites must lie in one plate, the batch, and everything else be event dimensions."""

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        traces: Iterator[tuple[Any, Any]] = self._get_traces(model, guide, args, kwargs)
        return torch.stack([negative_elbo(*pair) for pair in traces]).mean()

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()


def negative_elbo(model_trace: Any, guide_trace: Any) -> Tensor:
    """Summed over the batch, times the plate's scale where it subsamples.

    Raises:
        NotImplementedError: any other model; nothing is approximated.
    """
    sites = [site for site in model_trace.nodes.values() if site["type"] == "sample"]
    latent = [site["name"] for site in sites if not site["is_observed"]]
    observed = [site["name"] for site in sites if site["is_observed"]]
    drawn = [name for name, site in guide_trace.nodes.items() if site["type"] == "sample"]
    if len(latent) != 1 or len(observed) != 1 or drawn != latent:
        raise NotImplementedError(
            "the model must have one latent and one observed site and the guide that latent one, "
            f"got latent {latent}, observed {observed}, in the guide {drawn}"
        )
    q, p, x = guide_trace.nodes[latent[0]], *(model_trace.nodes[n] for n in (*latent, *observed))
    for site in (q, p, x):
        shape = list(site["fn"].batch_shape)
        if len(shape) != 1:
            raise NotImplementedError(f"{site['name']} must be in one plate, got batch {shape}")
        if site["mask"] is not None or isinstance(site["scale"], Tensor):
            raise NotImplementedError(f"{site['name']} has a mask or a tensor as its scale")
    if not q["scale"] == p["scale"] == x["scale"]:
        raise NotImplementedError("the latent and the observed site must have one scale")
    posterior, prior, likelihood = (base(site["fn"]) for site in (q, p, x))
    for site, fn in ((q, posterior), (p, prior)):
        if type(fn) is not dist.Normal:
            raise NotImplementedError(f"{site['name']} must be Normal, got {type(fn).__name__}")

    kl = kl_divergence(fastvae.from_distribution(posterior), prior)  # fastvae's, [batch]
    family, recon = to_family(x["name"], likelihood)
    loss = fastvae.elbo_loss(recon, x["value"], kl=kl, likelihood=family, reduction="sum")
    return loss * x["scale"]


def base(fn: Any) -> Any:
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return fn


def to_family(name: str, fn: Any) -> tuple[str, Tensor | tuple[Tensor, Tensor]]:
    if type(fn) is dist.Bernoulli:
        return "bernoulli", fn.logits
    if type(fn) is dist.Normal:
        return "gaussian_logvar", (fn.loc, 2 * fn.scale.log())
    raise NotImplementedError(f"{name} must be Bernoulli or Normal, got {type(fn).__name__}")


class VAE(nn.Module):
    def __init__(self, latents: int = 8, hidden: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 2 * latents)
        )
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.GELU(), nn.Linear(hidden, 64))
        self.latents = latents

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("batch", len(x)):
            prior = dist.Normal(x.new_zeros(self.latents), x.new_ones(self.latents))
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("batch", len(x)):
            mu, logvar = self.encoder(x).chunk(2, dim=1)
            pyro.sample("z", dist.Normal(mu, (0.5 * logvar).exp()).to_event(1))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = parse(argv)
    pyro.set_rng_seed(args.seed)
    pyro.clear_param_store()
    digits = (torch.tensor(load_digits().data) > 7).float()
    vae = VAE()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), FastELBO())
    losses = []
    for epoch in range(1, args.epochs + 1):
        batches = digits[torch.randperm(len(digits))].split(args.batch_size)
        losses.append(sum(svi.step(x) for x in batches) / len(digits))
        print(f"{epoch:4d}  loss {losses[-1]:8.3f} nats per digit")
    return {"first_loss": losses[0], "loss": losses[-1]}


if __name__ == "__main__":
    main()
