"""criterion.check() and fastvae.diagnose()."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import fastvae

B, D, L = 6, 5, 3


def criterion(**options: Any) -> fastvae.ELBOLoss:
    return fastvae.ELBOLoss("gaussian", track_nonfinite=True, **options)


def step(loss: Any, recon: Tensor, kl: Tensor, **options: Any) -> Tensor:
    recon = recon.clone().requires_grad_()
    loss(recon, torch.zeros(recon.shape[-2:]), kl=kl, **options).sum().backward()
    return recon.grad


def good() -> tuple[Tensor, Tensor]:
    return torch.ones(B, D), torch.ones(B)


def spoiled(shape: tuple[int, ...], *where: tuple[int, ...], value: float = math.nan) -> Tensor:
    t = torch.ones(shape)
    for index in where:
        t[index] = value
    return t


def test_silent_where_everything_is_finite(backend: str) -> None:
    loss = criterion(backend=backend)
    loss.check()  # before any call
    step(loss, *good())
    loss.check()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_names_the_term_the_call_and_the_row(value: float, backend: str) -> None:
    loss = criterion(backend=backend)
    step(loss, *good())
    step(loss, spoiled((B, D), (4, 1), (4, 2), (5, 0), value=value), torch.ones(B))
    step(loss, *good())
    step(loss, spoiled((B, D), (0, 0), value=value), spoiled((B,), (3,), value=value))
    wanted = (
        r"log_likelihood in 3 of 24 rows, first in call 1, row 4; "
        r"kl in 1 of 24 rows, first in call 3, row 3$"
    )
    with pytest.raises(FloatingPointError, match=wanted):
        loss.check()
    loss.check()  # starts again
    step(loss, *good(), sample_weight=spoiled((B,), (2,)))
    with pytest.raises(FloatingPointError, match=r"sample_weight in 1 of 6 rows.*call 0, row 2"):
        loss.check()


def test_a_row_is_bad_if_one_of_its_draws_is(backend: str) -> None:
    loss = criterion(backend=backend)
    step(loss, spoiled((4, B, D), (1, 2, 0), (3, 2, 0), (2, 5, 1)), torch.ones(B))
    with pytest.raises(FloatingPointError, match=r"log_likelihood in 2 of 6 rows.*row 2"):
        loss.check()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_tracking_changes_no_value_and_no_gradient(reduction: str, backend: str) -> None:
    recon, kl = torch.randn(2, B, D), torch.rand(B)
    plain = fastvae.ELBOLoss("gaussian", reduction=reduction, backend=backend)
    tracked = criterion(reduction=reduction, backend=backend)
    assert torch.equal(step(plain, recon, kl), step(tracked, recon, kl))
    assert torch.equal(
        plain(recon, torch.zeros(B, D), kl=kl), tracked(recon, torch.zeros(B, D), kl=kl)
    )


def test_an_empty_batch_and_no_grad() -> None:
    loss = criterion()
    loss(torch.ones(0, D), torch.ones(0, D), kl=torch.ones(0))
    with torch.no_grad():
        loss(spoiled((B, D), (3, 0)), torch.zeros(B, D), kl=torch.ones(B))
    with pytest.raises(FloatingPointError, match="in 1 of 6 rows, first in call 0, row 3"):
        loss.check()


@pytest.mark.parametrize("compiled", [False, True])
def test_counters_made_in_inference_mode_serve_training(compiled: bool) -> None:
    """Lightning validates before it trains."""
    loss = criterion()
    run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    with torch.inference_mode():
        run(spoiled((B, D), (2, 0)), torch.zeros(B, D), kl=torch.ones(B))
    step(run, *good())
    with pytest.raises(FloatingPointError, match="in 1 of 12 rows, first in call 0, row 2"):
        loss.check()
    step(run, *good())
    loss.check()


def test_check_resets_in_place() -> None:
    """A captured CUDA graph goes on writing to the same memory."""
    loss = criterion()
    step(loss, *good())
    (counter,) = loss._nonfinite.values()
    before = counter.state.data_ptr()
    loss.check()
    assert counter.state.data_ptr() == before and not counter.state.any()


def test_the_meta_device_is_not_counted() -> None:
    loss = criterion()
    step(loss, spoiled((B, D), (2, 0)), torch.ones(B))
    meta = torch.ones(B, D, device="meta")
    loss(meta, meta, kl=torch.ones(B, device="meta"))
    with pytest.raises(FloatingPointError, match="in 1 of 6 rows"):
        loss.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("draws", [None, 3])
def test_the_eager_counter_is_the_kernels(
    draws: int | None, dtype: torch.dtype, native: None
) -> None:
    from fastvae._backends import cpp, eager

    states = [torch.zeros(5, 3, dtype=torch.int64) for _ in range(2)]
    for call in range(30):
        size = (call * 7) % 5  # an empty batch among them
        shape = (size,) if draws is None else (draws, size)
        terms = []
        for t in (torch.rand(shape), torch.rand(size), torch.rand(size)):
            bad = torch.rand(t.shape)
            t[bad < 0.05], t[bad > 0.97] = torch.nan, -torch.inf
            terms.append(t.to(dtype))
        weight = terms[2] if call % 2 else None
        cpp.count_nonfinite(states[0], terms[0], terms[1], weight)
        eager.count_nonfinite(states[1], terms[0], terms[1], weight)
        assert torch.equal(*states)
    assert states[0][0].all()


def test_the_other_devices_counter_is_called_as_the_dispatcher_does(native: None) -> None:
    """Without the arguments that are the schema's defaults."""
    from fastvae._backends import eager

    state = torch.zeros(5, 3, dtype=torch.int64)
    library = torch.library.Library("fastvae_test", "DEF")
    schema = str(torch.ops.fastvae.count_nonfinite.default._schema).removeprefix("fastvae::")
    library.define(schema)
    library.impl("count_nonfinite", eager.count_nonfinite, "CPU")
    torch.ops.fastvae_test.count_nonfinite(state, spoiled((B,), (2,)), torch.ones(B), None)
    assert state[0].tolist() == [1, 0, 0] and state[2, 0] == 2


def test_check_wants_the_option() -> None:
    with pytest.raises(RuntimeError, match="track_nonfinite=True"):
        fastvae.ELBOLoss().check()


def test_compiled_steps_are_counted() -> None:
    loss = criterion()
    compiled = torch.compile(
        lambda recon, kl: loss(recon, torch.zeros(B, D), kl=kl), fullgraph=True, backend="aot_eager"
    )
    compiled(*good())
    compiled(spoiled((B, D), (1, 1)), torch.ones(B))
    compiled(*good())
    with pytest.raises(FloatingPointError, match="in 1 of 18 rows, first in call 1, row 1"):
        loss.check()


def test_state_and_copies() -> None:
    loss = criterion()
    step(loss, spoiled((B, D), (1, 1)), torch.ones(B))
    assert loss.state_dict() == {}
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        with pytest.raises(FloatingPointError):
            twin.check()
    with pytest.raises(FloatingPointError):
        loss.check()


def test_functorch_still_works() -> None:
    loss = criterion()
    x = torch.zeros(B, D)
    got = torch.func.grad(lambda r: loss(r, x, kl=torch.ones(B)))(torch.ones(B, D))
    torch.testing.assert_close(got, torch.full((B, D), 1 / B))
    loss.check()


# ---------------------------------------------------------------------------------------- diagnose


@pytest.mark.parametrize("event", [(L,), (2, 3, 4), ()], ids=str)
@pytest.mark.parametrize("with_prior", [False, True])
def test_kl_per_dim(event: tuple[int, ...], with_prior: bool, backend: str) -> None:
    mu, logvar = torch.randn(9, *event), torch.randn(9, *event)
    prior = (torch.randn(event), torch.randn(9, *event)) if with_prior else None
    got = fastvae.diagnose(mu, logvar, prior=prior, backend=backend)
    mean, log = prior if prior is not None else (torch.zeros(()), torch.zeros(()))
    p = Normal(mean.double(), (0.5 * log.double()).exp())
    want = kl_divergence(Normal(mu.double(), (0.5 * logvar.double()).exp()), p).mean(0).float()
    torch.testing.assert_close(got.kl_per_dim, want)
    torch.testing.assert_close(got.kl, want.sum())
    dims = max(want.numel(), 1)
    torch.testing.assert_close(got.kl_bits_per_latent, want.sum() / dims / math.log(2))
    whole = fastvae.kl_divergence(mu, logvar, prior=prior, backend=backend).mean()
    torch.testing.assert_close(got.kl, whole)


def test_active_units_of_a_collapsed_posterior() -> None:
    mu, logvar = torch.zeros(1000, 4), torch.zeros(1000, 4)
    mu[:, 1] = torch.randn(1000)
    mu[:, 3] = 7.0  # far from the prior, but the same for every x
    got = fastvae.diagnose(mu, logvar)
    assert got.active.tolist() == [False, True, False, False]
    assert int(got.active_units) == 1
    assert got.kl_per_dim[0] == 0 and got.kl_per_dim[3] == 24.5
    assert int(fastvae.diagnose(mu, logvar, threshold=2.0).active_units) == 0


def test_bits_per_dim_of_noise_is_one() -> None:
    """A decoder that knows nothing of fair coin flips pays one bit for each."""
    x = torch.randint(0, 2, (50, 1, 6, 6)).float()
    mu, logvar = torch.zeros(50, 2), torch.zeros(50, 2)
    for reduction in ("mean", "none"):
        loss = fastvae.elbo_loss(torch.zeros_like(x), x, mu, logvar, reduction=reduction)
        got = fastvae.diagnose(mu, logvar, loss=loss, x=x)
        assert got.bits_per_dim is not None
        torch.testing.assert_close(got.bits_per_dim, torch.tensor(1.0))
    assert fastvae.diagnose(mu, logvar).bits_per_dim is None


def test_diagnose_has_no_gradient_and_takes_half_precision() -> None:
    mu = torch.randn(5, 3, dtype=torch.bfloat16).requires_grad_()
    got = fastvae.diagnose(mu, mu)
    assert got.kl_per_dim.dtype == torch.float32
    assert not any(t.requires_grad for t in got if t is not None)


def test_diagnose_refuses() -> None:
    mu = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"at least one sample, got \[0, 3\]"):
        fastvae.diagnose(mu[:0], mu[:0])
    with pytest.raises(ValueError, match="together, got x alone"):
        fastvae.diagnose(mu, mu, x=mu)
    with pytest.raises(ValueError, match="together, got loss alone"):
        fastvae.diagnose(mu, mu, loss=torch.zeros(()))
    with pytest.raises(TypeError, match="loss must be a tensor, got float"):
        fastvae.diagnose(mu, mu, loss=3.0, x=mu)
    with pytest.raises(TypeError, match=r"loss must be floating, got torch.int64"):
        fastvae.diagnose(mu, mu, loss=torch.ones(4, dtype=torch.int64), x=mu)
    with pytest.raises(ValueError, match=r"loss must have shape \[\] or \[4\], got \[9, 9\]"):
        fastvae.diagnose(mu, mu, loss=torch.zeros(9, 9), x=mu)
    for x in (torch.zeros(()), torch.zeros(2, 7)):
        with pytest.raises(ValueError, match="x must have mu's batch size 4"):
            fastvae.diagnose(mu, mu, loss=torch.zeros(()), x=x)
    with pytest.raises(ValueError, match=r"same shape, got \[4, 3\] and \[4, 2\]"):
        fastvae.diagnose(mu, mu[:, :2])
    with pytest.raises(ValueError, match="prior mu must broadcast"):
        fastvae.diagnose(mu, mu, prior=(torch.zeros(2), torch.zeros(3)))
