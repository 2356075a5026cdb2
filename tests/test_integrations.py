"""The examples compute what the libraries they are for compute themselves: value and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_examples import load, need
from torch import Tensor, nn

import fastvae
from fastvae.likelihoods import Gaussian


def noise_like(mu: Tensor) -> Tensor:
    """What fastvae adds to mu, in units of sigma, when the generator is in the same state."""
    return fastvae.rsample(torch.zeros_like(mu), torch.zeros_like(mu))


def assert_same(ours: Tensor, theirs: Tensor, module: nn.Module, other: nn.Module) -> None:
    """The same value and the same gradient of every parameter. In float64, where the library
    allows it, a dropped constant or another average is far outside."""
    torch.testing.assert_close(ours, theirs)
    upstream = torch.linspace(0.5, 2.1, ours.numel(), dtype=ours.dtype).view_as(ours)
    names, parameters = zip(*module.named_parameters(), strict=True)
    options = {"allow_unused": True, "retain_graph": True}
    grads = torch.autograd.grad(ours, parameters, upstream, **options)
    expected = torch.autograd.grad(theirs, list(other.parameters()), upstream, **options)
    assert any(grad is not None and grad.any() for grad in grads)
    for name, grad, reference in zip(names, grads, expected, strict=True):
        torch.testing.assert_close(grad, reference, msg=lambda text, name=name: f"{name}: {text}")


def test_diffusers_loss() -> None:
    """The KL is posterior.kl(), where diffusers clamps logvar too; so is the whole loss."""
    need("diffusers")
    example = load("diffusers_kl")
    vae = example.make_vae().double()
    nn.init.normal_(vae.quant_conv.weight)
    with torch.no_grad():
        vae.quant_conv.bias[-1] = -60  # one channel's logvar is below -30
    x = 2 * torch.rand(3, 1, 16, 16, dtype=torch.float64) - 1
    posterior = vae.encode(x).latent_dist
    assert (posterior.logvar == -30).any() and (posterior.logvar != -30).any()

    _, kl = fastvae.rsample_kl(posterior.mean, posterior.logvar)
    assert_same(kl, posterior.kl(), vae, vae)

    torch.manual_seed(7)
    loss, _, _ = example.negative_elbo(vae, fastvae.ELBOLoss(Gaussian(scale=0.2)), x)
    torch.manual_seed(7)
    posterior = vae.encode(x).latent_dist
    recon = vae.decode(posterior.mean + posterior.std * noise_like(posterior.mean)).sample
    nll = -torch.distributions.Normal(recon, 0.2).log_prob(x).sum((1, 2, 3))
    assert_same(loss, (nll + posterior.kl()).mean(), vae, vae)


@pytest.mark.parametrize("mean_field", [False, True])
def test_pyro_samples_the_latent(mean_field: bool) -> None:
    """The ELBO of Pyro's own Normal under the same noise, closed-form KL or not."""
    pyro, infer = need("pyro"), need("pyro.infer")
    from fastvae.integrations.pyro import DiagonalNormal

    normal, bernoulli = pyro.distributions.Normal, pyro.distributions.Bernoulli
    encoder, decoder = nn.Linear(12, 8).double(), nn.Linear(4, 12).double()
    x = torch.rand(6, 12).round().double()
    noise = noise_like(torch.zeros(6, 4).double())

    def model(ours: bool) -> None:
        zero = x.new_zeros(6, 4)
        prior = DiagonalNormal(zero, zero) if ours else normal(zero, 1.0).to_event(1)
        with pyro.plate("batch", 6):
            z = pyro.sample("z", prior)
            pyro.sample("x", bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(ours: bool) -> None:
        mu, logvar = encoder(x).chunk(2, 1)
        q = DiagonalNormal(mu, logvar) if ours else Drawn(mu, (0.5 * logvar).exp()).to_event(1)
        with pyro.plate("batch", 6):
            pyro.sample("z", q)

    class Drawn(normal):  # type: ignore[misc, valid-type]
        def rsample(self, sample_shape: Any = ()) -> Tensor:
            drawn: Tensor = self.loc + self.scale * noise
            return drawn

    elbo = infer.TraceMeanField_ELBO() if mean_field else infer.Trace_ELBO()
    both = nn.ModuleList([encoder, decoder])
    torch.manual_seed(7)
    noise = noise_like(torch.zeros(6, 4).double())
    torch.manual_seed(7)
    ours, theirs = (elbo.differentiable_loss(model, guide, which) for which in (True, False))
    assert_same(ours, theirs, both, both)


def test_diffusers_video_latents() -> None:
    """Of [B, C, T, H, W], diffusers' kl() leaves one value per column; here one per video."""
    need("diffusers")
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    latents = nn.ParameterList([torch.randn(2, 8, 3, 4, 5, dtype=torch.float64)])
    posterior = DiagonalGaussianDistribution(latents[0])
    z, kl = fastvae.rsample_kl(posterior.mean, posterior.logvar)
    assert z.shape == (2, 4, 3, 4, 5) and posterior.kl().shape == (2, 5)
    assert_same(kl, posterior.kl().sum(-1), latents, latents)


@pytest.mark.parametrize("reconstruction_loss", ["bce", "mse"])
def test_pythae_loss(reconstruction_loss: str) -> None:
    need("pythae.models")
    from pythae.data.datasets import DatasetOutput
    from pythae.models import VAE, VAEConfig

    example = load("pythae_model")
    config = VAEConfig(input_dim=(1, 8, 8), latent_dim=5, reconstruction_loss=reconstruction_loss)
    ours, theirs = example.FastVAE(config).double(), VAE(config).double()
    theirs.load_state_dict(ours.state_dict())
    x = DatasetOutput(data=torch.rand(7, 1, 8, 8, dtype=torch.float64))
    theirs._sample_gauss = lambda mu, std: (mu + std * noise_like(mu), None)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(7)
        outputs.append(model(x))
    assert_same(outputs[0].loss, outputs[1].loss, ours, theirs)
    for term in ("recon_loss", "reg_loss", "recon_x", "z"):
        torch.testing.assert_close(outputs[0][term], outputs[1][term])


@pytest.mark.parametrize("observed_library", [True, False])
@pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
def test_scvi_loss(observed_library: bool, latent_distribution: str) -> None:
    need("scvi")
    from scvi.module import VAE

    example = load("scvi_module")
    options: dict[str, Any] = {
        "n_input": 30,
        "n_batch": 2,
        "dropout_rate": 0.0,
        "latent_distribution": latent_distribution,
        "use_observed_lib_size": observed_library,
    }
    if not observed_library:
        options["library_log_means"] = torch.tensor([[3.0, 3.5]]).numpy()
        options["library_log_vars"] = torch.tensor([[0.2, 0.1]]).numpy()
    # scVI's library prior is in float32 whatever the module's dtype.
    dtype = torch.float64 if observed_library else torch.float32
    ours, theirs = example.FastVAE(**options).to(dtype), VAE(**options).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    tensors = {
        "X": torch.poisson(torch.full((16, 30), 2.0, dtype=dtype)),
        "batch": torch.arange(16).remainder(2)[:, None],
        "labels": torch.zeros(16, 1, dtype=torch.int64),
    }

    def inference(*args: Any, **kwargs: Any) -> dict[str, Any]:
        outputs = VAE.inference(theirs, *args, **kwargs)
        q = outputs["qz"]
        z = q.loc + q.scale * noise_like(q.loc)
        return {**outputs, "z": theirs.z_encoder.z_transformation(z)}

    theirs.inference = inference
    losses = []
    for module in (ours, theirs):
        torch.manual_seed(7)
        losses.append(module(tensors, loss_kwargs={"kl_weight": 0.3})[2])
    assert_same(losses[0].loss, losses[1].loss, ours, theirs)
    assert losses[0].kl_local.keys() == losses[1].kl_local.keys()
    for name, kl in losses[0].kl_local.items():
        torch.testing.assert_close(kl, losses[1].kl_local[name])


class PyroVAE(nn.Module):
    """One that the ELBO takes, and by its options some that it refuses."""

    def __init__(self, observe: str = "bernoulli", plate: int = 6, latent: str = "normal") -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(9, 4), nn.Linear(2, 18)
        self.observe, self.plate, self.latent = observe, plate, latent

    def rows(self, x: Tensor) -> Any:
        import pyro

        return pyro.plate("rows", self.plate, subsample=torch.arange(len(x)))

    def model(self, x: Tensor) -> None:
        import pyro
        import pyro.distributions as dist

        pyro.module("decoder", self.decoder)
        with self.rows(x):
            prior = dist.Normal(x.new_full((2,), 0.1), x.new_full((2,), 1.5)).to_event(1)
            z = pyro.sample("z", prior)
            if self.latent == "two":
                pyro.sample("w", prior)
            first, second = self.decoder(z).chunk(2, dim=-1)
            fn = {
                "bernoulli": dist.Bernoulli(logits=first),
                "probs": dist.Bernoulli(first.sigmoid()),
                "normal": dist.Normal(first, second.exp()),
                "fixed": dist.Normal(first, 0.3),
                "laplace": dist.Laplace(first, 1.0),
                "masked": dist.Normal(first, 0.3).mask(x > 0),
            }[self.observe]
            pyro.sample("x", fn.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        import pyro
        import pyro.distributions as dist

        pyro.module("encoder", self.encoder)
        with self.rows(x):
            mu, scale = self.encoder(x).chunk(2, dim=-1)
            fn = dist.Laplace if self.latent == "laplace" else dist.Normal
            pyro.sample("z", fn(mu, scale.exp()).to_event(1))


@pytest.mark.parametrize("plate", [6, 60], ids=["whole", "subsampled"])
@pytest.mark.parametrize("observe", ["bernoulli", "probs", "normal", "fixed"])
def test_pyro_elbo(observe: str, plate: int) -> None:
    """Loss and gradients of TraceMeanField_ELBO, which draws the same z under the same seed."""
    pyro = need("pyro")
    vae = PyroVAE(observe, plate).double()
    x = torch.bernoulli(torch.full((6, 9), 0.5, dtype=torch.float64))
    losses, grads = [], []
    for elbo in (load("pyro_elbo").FastELBO, pyro.infer.TraceMeanField_ELBO):
        for call in ("differentiable_loss", "loss", "loss_and_grads"):
            pyro.clear_param_store()
            pyro.set_rng_seed(7)
            vae.zero_grad()
            loss = getattr(elbo(num_particles=2), call)(vae.model, vae.guide, x)
            losses.append(loss.item() if isinstance(loss, Tensor) else loss)
        grads.append([parameter.grad for parameter in vae.parameters()])
    assert losses == pytest.approx([losses[-1]] * 6, rel=1e-12)
    assert all(grad is not None and grad.any() for grad in grads[0])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"latent": "two"}, r"one latent .* got latent \['z', 'w'\]"),
        ({"latent": "laplace"}, "z must be Normal, got Laplace"),
        ({"observe": "laplace"}, "x must be Bernoulli or Normal, got Laplace"),
        ({"observe": "masked"}, "x must be Bernoulli or Normal, got MaskedDistribution"),
    ],
)
def test_pyro_refuses(options: dict[str, str], message: str) -> None:
    pyro = need("pyro")
    pyro.clear_param_store()
    vae = PyroVAE(**options)
    elbo = load("pyro_elbo").FastELBO()
    with pytest.raises(NotImplementedError, match=message):
        elbo.loss(vae.model, vae.guide, torch.ones(6, 9))


def test_pyro_refuses_more_than_one_plate() -> None:
    pyro = need("pyro")
    pyro.clear_param_store()
    vae = PyroVAE()
    elbo = load("pyro_elbo").FastELBO(num_particles=2, vectorize_particles=True)
    with pytest.raises(NotImplementedError, match=r"z must be in one plate, got batch \[2, 6\]"):
        elbo.loss(vae.model, vae.guide, torch.ones(6, 9))
    masked = pyro.poutine.mask(vae.model, mask=torch.ones(6, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="z has a mask"):
        load("pyro_elbo").FastELBO().loss(masked, vae.guide, torch.ones(6, 9))


@pytest.mark.filterwarnings("ignore")  # scvi-tools', Lightning's and anndata's own
@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
def test_scvi_accelerated(likelihood: str, dispersion: str) -> None:
    """An unmodified SCVI has the same loss and gradients, and trains to the same curve."""
    scvi = pytest.importorskip("scvi")
    from fastvae.integrations.scvi import accelerate

    np.random.seed(0)
    cells = scvi.data.synthetic_iid(batch_size=60, n_genes=40)
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")

    def run(accelerated: bool) -> tuple[list[torch.Tensor], np.ndarray]:
        scvi.settings.seed = 3
        model = scvi.model.SCVI(cells, gene_likelihood=likelihood, dispersion=dispersion)
        undo = accelerate(model) if accelerated else None
        tensors = next(iter(model._make_data_loader(cells, batch_size=64)))
        torch.manual_seed(1)
        loss = model.module(tensors)[2].loss
        wanted = dict(model.module.named_parameters())
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        model.train(max_epochs=3, accelerator="cpu", enable_progress_bar=False, train_size=1.0)
        curve = model.history["elbo_train"].to_numpy(float).ravel()
        if undo is not None:
            kind = type(model.module(tensors)[1]["px"]).__name__
            assert kind.startswith("Fused")
            undo()
            assert not type(model.module(tensors)[1]["px"]).__name__.startswith("Fused")
        return [loss.detach(), *(g for g in grads if g is not None)], curve

    (theirs, their_curve), (ours, our_curve) = run(False), run(True)
    assert len(ours) == len(theirs)
    for got, want in zip(ours, theirs, strict=True):
        # That of a bias in front of a batch norm is 0 but for rounding.
        near = max(1e-4 * float(want.abs().max()), 1e-6)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=near)
    np.testing.assert_allclose(our_curve, their_curve, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:We recommend using setup_mudata:DeprecationWarning")
@pytest.mark.parametrize("name", ["TOTALVI-nb", "TOTALVI-zinb", "PEAKVI"])
def test_other_scvi_models_accelerated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss and gradients; the method that was replaced comes back."""
    scvi = pytest.importorskip("scvi")
    from fastvae.integrations.scvi import accelerate

    np.random.seed(0)
    cells = scvi.data.synthetic_iid(batch_size=60, n_genes=40)
    kind, *likelihood = name.split("-")
    scvi.settings.seed = 3
    if kind == "TOTALVI":
        scvi.model.TOTALVI.setup_anndata(
            cells, batch_key="batch", protein_expression_obsm_key="protein_expression"
        )
        model = scvi.model.TOTALVI(cells, gene_likelihood=likelihood[0])
    else:
        scvi.model.PEAKVI.setup_anndata(cells, batch_key="batch")
        model = scvi.model.PEAKVI(cells)
    tensors = next(iter(model._make_data_loader(cells, batch_size=64)))
    wanted = dict(model.module.named_parameters())

    calls: list[Any] = []
    fused = fastvae.log_likelihood
    monkeypatch.setattr(fastvae, "log_likelihood", lambda *a: (calls.append(a), fused(*a))[1])

    def run() -> list[torch.Tensor]:
        torch.manual_seed(1)
        loss = model.module(tensors)[2].loss
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        return [loss.detach(), *(g for g in grads if g is not None)]

    theirs = run()
    undo = accelerate(model)
    with pytest.raises(RuntimeError, match=r"get_reconstruction_loss.*already"):
        accelerate(model.module)
    assert not calls
    ours = run()
    assert len(calls) == 1
    undo()
    assert torch.equal(run()[0], theirs[0]) and len(calls) == 1
    assert len(ours) == len(theirs)
    for got, want in zip(ours, theirs, strict=True):
        # That of a bias in front of a batch norm is 0 but for rounding of the loss's terms.
        near = max(1e-4 * float(want.abs().max()), 1e-6 * float(theirs[0]))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=near)


def test_scvi_accelerated_gives_the_terms_too() -> None:
    pytest.importorskip("scvi")
    from scvi.distributions import NegativeBinomial

    from fastvae.integrations.scvi import _kinds, accelerate

    x = torch.poisson(torch.ones(4, 5))
    plain = NegativeBinomial(mu=torch.rand(4, 5), theta=torch.rand(5) + 0.1)
    fused = _kinds()[NegativeBinomial](mu=plain.mu, theta=plain.theta)
    torch.testing.assert_close(-fused.log_prob(x), -plain.log_prob(x))
    torch.testing.assert_close(fused.log_prob(x).mean(), plain.log_prob(x).mean())
    torch.testing.assert_close(torch.exp(fused.log_prob(x)), plain.log_prob(x).exp())
    torch.testing.assert_close(fused.log_prob(x).sum(-1), plain.log_prob(x).sum(-1))
    torch.testing.assert_close(2 * fused.log_prob(x) + 1, 2 * plain.log_prob(x) + 1)
    with pytest.raises(TypeError, match="generative"):
        accelerate(torch.nn.Linear(2, 2))
