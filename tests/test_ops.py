"""torch.ops.fastvae as PyTorch sees it: opcheck, compile, torch.func, double backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.library import opcheck

import fastvae
from fastvae.likelihoods import Gaussian, registry

ops = torch.ops.fastvae
SEED = torch.tensor([1234567])


def leaf(*shape: int, positive: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    t = torch.rand(*shape, dtype=dtype) if positive else torch.randn(*shape, dtype=dtype)
    return t.requires_grad_()


def operator_calls(device: str = "cpu") -> dict[str, tuple[Any, tuple[Any, ...]]]:
    with torch.device(device):
        return calls_with(SEED.to(device))


def calls_with(seed: Tensor) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    torch.manual_seed(0)
    mu, logvar, x, logits = leaf(5, 7), leaf(5, 7), torch.rand(5, 11), leaf(5, 11)
    kl, mask, weight = leaf(5, positive=True), torch.rand(5, 11) > 0.5, torch.rand(5)
    plain = [t.detach() for t in (mu, logvar, logits)]
    needs = [True, True, False, False, False]
    scalar = torch.zeros((), requires_grad=True)
    index = torch.tensor([9, 2, 2, 2**40, 0])
    image = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    counters = torch.zeros(5, 3, dtype=torch.int64)
    return {
        "count_nonfinite": (ops.count_nonfinite, (counters, torch.rand(2, 5), kl, weight)),
        "noise": (ops.noise, (seed, [5, 7], 2, 3)),
        "noise_each": (ops.noise_each, (torch.tensor([5, 6, 7]), [5, 7], 2, 3)),
        "rsample": (ops.rsample, (mu, logvar, seed)),
        "rsample-K": (ops.rsample, (mu, logvar, seed, 3, 2)),
        "rsample_kl": (ops.rsample_kl, (mu, logvar, seed)),
        "rsample_kl-index": (ops.rsample_kl, (mu, logvar, seed, 2, 0, index)),
        "rsample_backward": (
            ops.rsample_backward,
            (torch.randn(5, 7), torch.rand(5), plain[0], plain[1], seed, None, 0),
        ),
        "kl_divergence": (ops.kl_divergence, (mu, logvar)),
        "kl_divergence-mask": (ops.kl_divergence, (mu, logvar, None, None, plain[0] > 0)),
        "kl_divergence-prior": (ops.kl_divergence, (mu, logvar, leaf(5, 7), leaf(5, 7))),
        "log_likelihood": (ops.log_likelihood, (x, [logits], "bernoulli", [], mask)),
        "log_likelihood-K": (ops.log_likelihood, (x, [leaf(3, 5, 11)], "gaussian", [1.0, 0.0])),
        "log_likelihood-scalar": (
            ops.log_likelihood,
            (x, [logits, scalar], "gaussian_logvar", [0.0]),
        ),
        "row_forward": (
            ops.row_forward,
            (x, [plain[2]], "bernoulli", [], None, weight, -0.5, needs),
        ),
        "row_forward-kl": (
            ops.row_forward,
            (plain[0], [plain[1]], "standard_kl", [], None, weight, 1.0, needs),
        ),
        "row_forward-channels_last": (
            ops.row_forward,
            (image, [image], "bernoulli", [], image > 0.5, None, 1.0, needs),
        ),
        "elbo": (ops.elbo, (x, [logits], kl, "bernoulli", [], None, None, 1.0, "mean")),
        "elbo-none": (ops.elbo, (x, [logits], kl, "bernoulli", [], mask, weight, 2.0, "none")),
        "elbo_reduce": (ops.elbo_reduce, (torch.rand(3, 5), torch.rand(5), weight, 1.0, "sum")),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name: str) -> None:
    op, args = operator_calls()[name]
    opcheck(op.default, args)


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck_of_the_triton_kernels(name: str, triton_device: str) -> None:
    op, args = operator_calls(triton_device)[name]
    opcheck(op.default, args)


def test_opcheck_seed() -> None:
    # Its value is random: the two runs that test_aot_dispatch compares can't agree.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(ops.seed.default, (torch.zeros(1),), test_utils=utils)


def test_opcheck_seed_where_triton_runs(triton_device: str) -> None:
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(ops.seed.default, (torch.zeros(1, device=triton_device),), test_utils=utils)


def test_opcheck_elbo_inplace() -> None:
    # No torch.compile traces it (fastvae takes elbo there), which is what the other utilities try.
    _, args = operator_calls()["elbo"]
    args = tuple(args)
    recon = [p.detach().clone() for p in args[1]]
    opcheck(
        ops.elbo_inplace.default, (args[0], recon, *args[2:]),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_every_operator_is_checked() -> None:
    checked = {str(op) for op, _ in operator_calls().values()} | {
        "fastvae.seed",
        "fastvae.elbo_inplace",
        "fastvae.row_composite",  # of torch's operators
        "fastvae.rsample_composite",
    }
    schemas = torch._C._jit_get_all_schemas()
    declared = {s.name.replace("::", ".") for s in schemas if s.name.startswith("fastvae::")}
    assert {name.removesuffix(".default") for name in checked} == declared


def test_seed_is_what_randint_gives() -> None:
    torch.manual_seed(5)
    ours = [ops.seed(torch.zeros(1)) for _ in range(3)]
    torch.manual_seed(5)
    theirs = [torch.randint(2**63 - 1, (1,)) for _ in range(3)]
    assert torch.equal(torch.cat(ours), torch.cat(theirs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_draws_and_differentiates_alike(dynamic: bool) -> None:
    criterion = fastvae.ELBOLoss()

    def step(mu: Tensor, logvar: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        z, kl = fastvae.rsample_kl(mu, logvar)
        return criterion(z @ weight, x, kl=kl)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    weight = leaf(4, 9)
    for batch in (6, 8) if dynamic else (6,):
        mu, logvar, x = leaf(batch, 4), leaf(batch, 4), torch.rand(batch, 9)
        results = []
        for f in (step, compiled):
            torch.manual_seed(7)
            loss = f(mu, logvar, x, weight)
            results.append((loss, *torch.autograd.grad(loss, (mu, logvar, weight))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_the_seed_is_an_operator_of_ours_in_a_compiled_graph() -> None:
    """Inductor may replace torch.randint by a stream of its own."""
    graphs: list[str] = []

    def record(module: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(module.code)
        return module

    torch._dynamo.reset()
    torch.compile(lambda m: fastvae.rsample(m, m), fullgraph=True, backend=record)(leaf(3, 4))
    assert "fastvae.seed" in graphs[0] and "randint" not in graphs[0], graphs[0]


@pytest.mark.parametrize("family", registry)
def test_functorch_matches_autograd(family: str) -> None:
    likelihood = registry[family]()
    x, recon = likelihood.sample_inputs((5, 7))

    def value(*r: Tensor) -> Tensor:
        return fastvae.log_likelihood(r, x, likelihood).sum()

    leaves = tuple(t.clone().requires_grad_() for t in recon)
    expected = torch.autograd.grad(value(*leaves), leaves)
    argnums = tuple(range(len(recon)))
    for got, want in zip(grad(value, argnums)(*recon), expected, strict=True):
        torch.testing.assert_close(got, want)
    tangents = tuple(torch.randn_like(t) for t in recon)
    _, tangent = jvp(value, recon, tangents)
    inner = sum((t * g).sum() for t, g in zip(tangents, expected, strict=True))
    torch.testing.assert_close(tangent, inner)


def test_vmap_per_sample_gradients() -> None:
    criterion = fastvae.ELBOLoss()
    x, logits, kl = torch.rand(5, 7), torch.randn(5, 7), torch.rand(5)

    def one(logits: Tensor, x: Tensor, kl: Tensor) -> Tensor:
        return criterion(logits[None], x[None], kl=kl[None])

    per_sample = vmap(grad(one))(logits, x, kl)
    torch.testing.assert_close(per_sample, logits.sigmoid() - x)


def test_vmap_obeys_randomness() -> None:
    mu = torch.zeros(3, 2, 4)

    def draw(m: Tensor) -> Tensor:
        return fastvae.rsample(m, m)

    different = vmap(draw, randomness="different")(mu)
    assert different.unique().numel() == mu.numel()
    same = vmap(draw, randomness="same")(mu)
    assert torch.equal(same[0], same[1]) and same[0].unique().numel() == 8
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(draw)(mu)


def test_functional_call_through_rsample_kl() -> None:
    encoder = torch.nn.Linear(4, 6)
    params = dict(encoder.named_parameters())
    x = torch.rand(5, 4)

    def loss(params: dict[str, Tensor]) -> Tensor:
        mu, logvar = functional_call(encoder, params, (x,)).chunk(2, dim=1)
        z, kl = fastvae.rsample_kl(mu, logvar)
        return z.square().sum() + kl.sum()

    torch.manual_seed(3)
    got = grad(loss)(params)
    torch.manual_seed(3)
    mu, logvar = encoder(x).chunk(2, dim=1)
    z, kl = fastvae.rsample_kl(mu, logvar)
    (z.square().sum() + kl.sum()).backward()
    for name, p in encoder.named_parameters():
        torch.testing.assert_close(got[name], p.grad)


@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("indexed", [False, True])
def test_vmap_over_draws(
    num_samples: int | None, indexed: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each lane draws by its seed; torch would say on stderr that it has no batching rule."""
    mu, logvar = torch.randn(5, 3), torch.randn(5, 3)
    index = torch.tensor([3, 1, 4, 1, 5])

    def draw(seed: Tensor, rows: Tensor) -> Tensor:
        options = {"num_samples": num_samples, "sample_index": rows if indexed else None}
        return fastvae.rsample(mu, logvar, seed=seed, **options)

    seeds = torch.arange(7, 11)
    for lanes, dims in ((index, (0, None)), (index + torch.arange(4)[:, None], (0, 0))):
        got = vmap(draw, in_dims=dims)(seeds[:, None], lanes)
        rows = lanes.expand(4, 5) if lanes.dim() == 1 else lanes
        want = torch.stack([draw(s, r) for s, r in zip(seeds, rows, strict=True)])
        torch.testing.assert_close(got, want)
    nested = vmap(vmap(draw, in_dims=(0, None)), in_dims=(0, None))
    got = nested(seeds.view(2, 2, 1), index)
    torch.testing.assert_close(got.flatten(0, 1), torch.stack([draw(s, index) for s in seeds]))
    assert "batching rule" not in capfd.readouterr().err


def test_hessian_of_the_kl_is_the_closed_form() -> None:
    logvar = torch.randn(1, 4, dtype=torch.float64)
    h = hessian(lambda lv: fastvae.kl_divergence(torch.zeros_like(lv), lv).sum())(logvar)
    torch.testing.assert_close(h.reshape(4, 4), torch.diag(0.5 * logvar[0].exp()))


def double(*shape: int) -> Tensor:
    return leaf(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: ops.rsample(a, b, SEED, 2),
        lambda a, b: ops.rsample_kl(a, b, SEED, None, 0, torch.tensor([4, 1, 4])),
        lambda a, b: ops.rsample_kl(a, b, SEED),
        lambda a, b: fastvae.kl_divergence(a, b),
        lambda a, b: fastvae.kl_divergence(a, b, prior=(b * 0.5, a * 0.3)),
        lambda a, b: fastvae.log_likelihood(b, a.sigmoid()),
        lambda a, b: fastvae.log_likelihood(b.sigmoid(), a.sigmoid(), "bernoulli_probs"),
        lambda a, b: fastvae.log_likelihood(b, a, Gaussian(scale=0.5)),
        lambda a, b: fastvae.log_likelihood((b, a.sin()), a, "gaussian_logvar"),
        lambda a, b: fastvae.elbo_loss(b, a.sigmoid(), a, b),
        lambda a, b: fastvae.elbo_loss(b, a, a, b, likelihood="gaussian", reduction="none"),
    ],
)
def test_gradgradcheck(function: Callable[[Tensor, Tensor], Any]) -> None:
    torch.manual_seed(0)
    assert gradgradcheck(function, (double(3, 4), double(3, 4)))


def loss_of(z: Tensor) -> Tensor:
    torch.manual_seed(0)
    x, logits, mu = torch.rand(3, 4), torch.randn(3, 4), torch.randn(3, 2)
    return fastvae.elbo_loss(logits + z, x, mu + z[:, :2], mu)


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_a_tangent_of_the_upstream_gradient_is_not_lost(value: float) -> None:
    """Forward over reverse; 1.0 is the value for which the saved gradient is returned as it is."""
    z = torch.zeros(3, 4, requires_grad=True)
    (plain,) = torch.autograd.grad(loss_of(z), z)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.tensor(value), torch.tensor(5.0))
        (dual,) = torch.autograd.grad(loss_of(z), z, upstream)
        primal, tangent = forward_ad.unpack_dual(dual)
    assert tangent is not None
    torch.testing.assert_close(primal, value * plain)
    torch.testing.assert_close(tangent, 5.0 * plain)


def test_batched_upstream_gradients() -> None:
    z = torch.zeros(3, 4, requires_grad=True)
    (plain,) = torch.autograd.grad(loss_of(z), z)
    scales = torch.tensor([1.0, 2.0, -3.0])
    (got,) = torch.autograd.grad(loss_of(z), z, scales, is_grads_batched=True)
    torch.testing.assert_close(got, scales[:, None, None] * plain)


def test_functorch_keeps_the_gradient_of_saturated_probabilities() -> None:
    x, p = torch.tensor([[1.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 1.0, 1e-13, 0.5]])

    def value(p: Tensor) -> Tensor:
        return fastvae.log_likelihood(p, x, "bernoulli_probs").sum()

    leaf = p.clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(leaf), leaf)
    torch.testing.assert_close(grad(value)(p), expected)


def test_a_gradient_that_a_saved_tensor_hook_holds_is_left_alone() -> None:
    held: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        held.append(t)
        return t

    logits = leaf(3, 4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = fastvae.elbo_loss(logits, torch.rand(3, 4), kl=torch.rand(3))
    before = [t.clone() for t in held]
    (3 * loss).backward()
    assert len(held) >= 3
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_compiled_autograd() -> None:
    logits, mu, logvar, x = leaf(3, 4), leaf(3, 2), leaf(3, 2), torch.rand(3, 4)

    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        z, kl = fastvae.rsample_kl(mu, logvar)
        (fastvae.elbo_loss(logits, x, kl=kl) + z.sum()).backward()
        grads = tuple(t.grad for t in (logits, mu, logvar))
        logits.grad = mu.grad = logvar.grad = None
        return grads

    expected = gradients()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        torch.testing.assert_close(gradients(), expected)


def test_annealing_beta_does_not_compile_again() -> None:
    criterion = fastvae.ELBOLoss()

    def step(logits: Tensor, x: Tensor, kl: Tensor) -> Tensor:
        return criterion(logits, x, kl=kl)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    logits, x, kl = leaf(3, 4), torch.rand(3, 4), torch.rand(3)
    for i in range(12):
        criterion.beta = 0.1 * i
        torch.testing.assert_close(compiled(logits, x, kl), step(logits, x, kl))
    assert counter.frame_count <= 3
