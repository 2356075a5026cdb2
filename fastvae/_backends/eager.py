"""The eager backend: plain PyTorch, any device, no compiled code.

It draws the kernels' noise: the same random bits, normals that differ by rounding.
"""

import math

import torch
from torch import Tensor

from fastvae import _composite
from fastvae._backends import _common
from fastvae._backends._common import Backend, Beta, Prior, Terms, readable
from fastvae._math import times_beta
from fastvae.likelihoods import Likelihood
from fastvae.likelihoods._base import sites

draw_seed = _common.draw_seed


def status() -> Backend:
    return Backend(True, "plain PyTorch on any device")


def _multiply(m: int, a: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of the 64-bit product of 32-bit words (int64 wraps, its bits are right)."""
    product = m * a
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF


def _noise(
    seed: Tensor,
    size: torch.Size,
    num_samples: int,
    sample_offset: int,
    sample_index: Tensor | None,
) -> Tensor:
    """The normals of csrc/math/philox.h, [K, *size] in float32."""
    batch, columns = size[0], size[1:].numel()
    device = seed.device
    sample = sample_index
    if sample is None:
        sample = torch.arange(batch, device=device) + sample_offset
    draw = sample * num_samples + torch.arange(num_samples, device=device)[:, None]
    index = draw[..., None] * columns + torch.arange(columns, device=device)

    counter = 16 * (index // 64) + index % 16
    c0, c1 = counter & 0xFFFFFFFF, counter >> 32
    c2 = c3 = torch.zeros_like(c0)
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high2, low2 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF

    which = index % 64 // 16  # of the counter's four normals
    a, b = torch.where(which < 2, c0, c2), torch.where(which < 2, c1, c3)
    u = (a >> 1).float() * 2.0**-31 + 2.0**-32
    angle = (b - ((b >> 31) << 32)).float() * (math.pi * 2.0**-31)  # b as a signed word
    normal = (-2 * u.log()).sqrt() * torch.where(which % 2 == 0, angle.cos(), angle.sin())
    return normal.view(num_samples, *size)


def _check_index(sample_index: Tensor, limit: int) -> None:
    if not readable(sample_index):
        return
    bad = (sample_index < 0) | (sample_index >= limit)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise ValueError(
            f"sample_index must be at least 0 and below {limit}, got {int(sample_index[row])} in "
            f"row {row}"
        )


def rsample(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int | None,
    sample_offset: int,
    sample_index: Tensor | None,
) -> Tensor:
    if sample_index is not None:
        _check_index(sample_index, 2**63 // (num_samples or 1) // max(mu.shape[1:].numel(), 1))
    eps = _noise(seed, mu.shape, num_samples or 1, sample_offset, sample_index)
    return _composite.sample(mu, logvar, eps.squeeze(0) if num_samples is None else eps)


def rsample_kl(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    num_samples: int | None,
    sample_offset: int,
    sample_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    z = rsample(mu, logvar, seed, num_samples, sample_offset, sample_index)
    return z, kl_divergence(mu, logvar, None, None)


def kl_divergence(mu: Tensor, logvar: Tensor, prior: Prior | None, mask: Tensor | None) -> Tensor:
    if prior is None:
        return _composite.rows((mu, logvar), "standard_kl", (), mask)
    return _composite.rows((mu, logvar, *prior), "normal_kl", (), mask)


def _check_domain(name: str, t: Tensor, domain: str, family: str, planes: int) -> None:
    """As csrc/rowwise.cpp has it."""
    inside = {
        "unit": lambda: (t >= 0) & (t <= 1),
        "nonnegative": lambda: t >= 0,
        "positive": lambda: t > 0,
        "count": lambda: (t >= 0) & (t == t.round()) & t.isfinite(),
        "index": lambda: (t >= 0) & (t == t.round()) & (t < planes),
    }
    words = {
        "unit": "lie in [0, 1]",
        "nonnegative": "be at least 0",
        "positive": "be above 0",
        "count": "hold counts (0, 1, 2, …)",
        "index": f"hold whole numbers from 0 to {planes - 1}",
    }
    if not t.is_floating_point():  # whole as it is
        t = t.double()
    if not readable(t) or bool(inside[domain]().all()):
        return
    low, high = t.min().item(), t.max().item()
    came = f"values in [{low}, {high}]"
    if low != low:
        came = "NaN"
    elif domain == "unit":
        came += _way_into_unit(low, high, name == "x")
    elif domain == "index" and low < 0:
        came += ": ignore_index leaves such elements out"
    elif domain == "count" and low >= 0 and high < math.inf:
        part = t[t != t.round()][0].item()
        came = f"{part}: of normalized or logarithmic expression take the raw counts"
    raise ValueError(f"{name} must {words[domain]} for {family}, got {came}")


def _way_into_unit(low: float, high: float, data: bool) -> str:
    """What to do about values in [low, high]; as csrc/rowwise.cpp says it."""
    rounding = 1e-3
    if low >= -rounding and high <= 1 + rounding:
        return ": rounding? clamp(0, 1) removes it"
    if not data:
        return ": are they logits? likelihood 'bernoulli' takes those"
    if low >= -rounding and 2 <= high <= 255 + rounding:
        return ": for pixel values divide by 255"
    if low >= -1 - rounding and high <= 1 + rounding:
        return ": for data in [-1, 1] take (x + 1) / 2 (and recon comes before x)"
    return ""


def log_likelihood(
    x: Tensor, params: tuple[Tensor, ...], likelihood: Likelihood, mask: Tensor | None
) -> Tensor:
    planes = params[0].shape[-x.dim()] if likelihood.family in sites else 1
    for name, t in zip(("x", *likelihood.formula_names), (x, *params), strict=True):
        if (domain := likelihood.domains.get(name)) is not None:
            if mask is not None and readable(mask):
                t, kept = torch.broadcast_tensors(t, mask)
                t = t[kept]
            _check_domain(name, t, domain, likelihood.family, planes)
    return _composite.rows((x, *params), likelihood.family, likelihood.options, mask)


def elbo(
    x: Tensor,
    params: tuple[Tensor, ...],
    kl: Tensor,
    likelihood: Likelihood,
    mask: Tensor | None,
    weight: Tensor | None,
    beta: Beta,
    reduction: str,
    inplace_backward: bool,  # autograd keeps what it keeps
) -> tuple[Terms, Tensor]:
    rows = log_likelihood(x, params, likelihood, mask)
    terms = combined(rows, kl, weight, beta, reduction)
    return Terms(terms.loss, terms.log_likelihood.detach(), terms.kl.detach()), rows.detach()


def combined(rows: Tensor, kl: Tensor, weight: Tensor | None, beta: Beta, reduction: str) -> Terms:
    """Loss and parts, each with a graph, from ln p of each row, [B] or [K, B], and the KL."""
    ll = rows.mean(0) if rows.dim() == 2 else rows
    kl = kl.to(torch.promote_types(kl.dtype, ll.dtype))
    # Autograd would multiply an infinite KL's gradient by 0: at β = 0 the KL stays out of the
    # graph, unless it is known to be finite.
    out = not isinstance(beta, Tensor) and beta == 0
    if out and not (readable(kl) and bool(kl.isfinite().all())):
        loss = -ll
    else:
        loss = times_beta(kl, beta) - ll
    parts = [loss, ll.to(loss.dtype), kl]
    if weight is not None:
        parts = [part * weight.to(loss.dtype) for part in parts]
    if reduction != "none":
        count = max(kl.shape[0], 1) if reduction == "mean" else 1
        parts = [part.sum() / count for part in parts]
    return Terms(*parts)


def count_nonfinite(state: Tensor, rows: Tensor, kl: Tensor, weight: Tensor | None = None) -> None:
    """Adds a call to the counters of csrc/nonfinite.cpp. No value is read back.

    As an operator's kernel it is called without the arguments that equal the schema's defaults.
    """
    size = rows.shape[-1]
    if size == 0:
        return
    with torch.no_grad():
        of_rows = _not_finite(rows)
        of_rows = of_rows.any(0) if of_rows.dim() == 2 else of_rows
        of_weight = torch.zeros_like(of_rows) if weight is None else _not_finite(weight)
        found = torch.stack((of_rows, _not_finite(kl), of_weight))
        now = found.sum(1)
        bad, call, row, calls, total = state.unbind()
        first = (bad == 0) & (now > 0)
        new = (
            bad + now,
            torch.where(first, calls, call),
            torch.where(first, found.int().argmax(1), row),  # of equals, the first
            calls + 1,
            total + size,
        )
        state.copy_(torch.stack(new))


def _not_finite(t: Tensor) -> Tensor:
    """isfinite takes four ops; t − t is 0 unless t is NaN or ±inf."""
    return (t - t) != 0
