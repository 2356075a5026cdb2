"""fastvae's count likelihoods under scvi-tools' models.

undo = fastvae.integrations.scvi.accelerate(model)  # or a module
model.train()
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import fastvae
from fastvae.likelihoods import Likelihood, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

_EPS = 1e-8  # what scvi-tools adds to its means


def accelerate(model_or_module: Any) -> Callable[[], None]:
    """Puts fastvae's likelihoods under a model of scvi-tools, or its module, of this process.

    The losses and gradients are the same to float32 rounding, and everything else is scvi-tools'
    own. What becomes one fused call:

    - where the module's `generative` returns a count distribution, as SCVI's does (gene_likelihood
      "zinb", "nb" or "poisson"; any dispersion), the sum of its `log_prob` over the genes. A
      dispersion per gene gets its gradient without one per cell;
    - the same of TOTALVI's genes. Its proteins' mixture stays as it is;
    - PEAKVI's binary cross-entropy over the regions.

    Args:
        model_or_module: such as ``scvi.model.SCVI(adata)``. Calls on CPU tensors and on GPUs alike.

    Returns:
        A function that takes it back.

    Raises:
        TypeError: no module with a ``generative`` method.
        RuntimeError: the module is accelerated already; the installed scvi-tools has not what this
            was written for (1.4).
    """
    module = getattr(model_or_module, "module", model_or_module)
    if not isinstance(module, nn.Module) or not callable(getattr(module, "generative", None)):
        raise TypeError(
            "model_or_module must be a model of scvi-tools or its module, with a `generative` "
            f"method, got {type(model_or_module).__name__}"
        )
    name, replacement = _replacement(module)
    if name in vars(module):
        raise RuntimeError(f"this module's `{name}` is replaced already: accelerated before?")
    vars(module)[name] = replacement

    def undo() -> None:
        vars(module).pop(name, None)

    return undo


def _replacement(module: nn.Module) -> tuple[str, Callable[..., Any]]:
    """The method that has a likelihood in it, and that method with ours."""
    from scvi.module import PEAKVAE, TOTALVAE

    if isinstance(module, TOTALVAE):
        return "get_reconstruction_loss", _renamed(module.get_reconstruction_loss)
    if isinstance(module, PEAKVAE):
        parameters = [*inspect.signature(module.get_reconstruction_loss).parameters]
        if parameters != ["p", "d", "f", "x"]:
            raise _moved(f"PEAKVAE.get_reconstruction_loss({', '.join(parameters)})")
        return "get_reconstruction_loss", _peaks
    generative: Callable[..., Any] = module.generative  # type: ignore[assignment]
    kinds = _kinds()

    @functools.wraps(generative)
    def accelerated(*args: Any, **kwargs: Any) -> Any:
        outputs = generative(*args, **kwargs)
        px = outputs.get("px") if isinstance(outputs, dict) else None
        if (kind := kinds.get(type(px))) is not None:
            px.__class__ = kind  # of no other state than its base
        return outputs

    return "generative", accelerated


def _renamed(method: Any) -> Callable[..., Any]:
    """The method, in which the names of scvi-tools' distributions are those of ours."""
    function = method.__func__
    ours = {theirs.__name__: kind for theirs, kind in _kinds().items()}
    if not {"NegativeBinomial", "ZeroInflatedNegativeBinomial"} <= {*function.__code__.co_names}:
        raise _moved(f"{function.__qualname__} without NegativeBinomial")
    with_ours = types.FunctionType(
        function.__code__,
        function.__globals__ | ours,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return types.MethodType(with_ours, method.__self__)


def _peaks(p: Tensor, d: Any, f: Any, x: Tensor) -> Tensor:
    """Whether a region is open, with probability p d f: accessibility, depth, factor."""
    return -fastvae.log_likelihood(p * d * f, x > 0, "bernoulli_probs")


def _moved(what: str) -> RuntimeError:
    import scvi

    return RuntimeError(
        f"scvi-tools {scvi.__version__} has {what}: fastvae.integrations.scvi was written for 1.4"
    )


@functools.cache
def _kinds() -> dict[type, type]:
    """Of scvi-tools' distributions, ours."""
    from scvi import distributions as theirs

    def checked(name: str, *attributes: str) -> Any:
        kind = getattr(theirs, name, None)
        code = getattr(getattr(kind, "__init__", None), "__code__", None)
        if code is None or not set(attributes) <= set(code.co_varnames):
            raise _moved(f"no scvi.distributions.{name} with {', '.join(attributes)}")
        return kind

    def fused(base: Any, likelihood: Likelihood, names: tuple[str, ...]) -> type:
        def log_prob(self: Any, value: Tensor) -> Any:
            recon = tuple(_as_given(getattr(self, name)) for name in names)
            return _Terms(value, recon, likelihood, lambda: base.log_prob(self, value))

        return type(f"Fused{base.__name__}", (base,), {"log_prob": log_prob})

    nb = checked("NegativeBinomial", "mu", "theta")
    zinb = checked("ZeroInflatedNegativeBinomial", "mu", "theta", "zi_logits")
    poisson = checked("Poisson", "rate")
    zeros = ZeroInflatedNegativeBinomial(eps=_EPS)
    return {
        nb: fused(nb, NegativeBinomial(eps=_EPS), ("mu", "theta")),
        zinb: fused(zinb, zeros, ("mu", "theta", "zi_logits")),
        poisson: fused(poisson, Poisson(), ("rate",)),
    }


def _as_given(t: Tensor) -> Tensor:
    """A parameter per gene as it was before the distribution expanded it to every cell."""
    base = t._base
    if base is None or base.dim() != 1 or t.dim() < 2 or any(t.stride()[:-1]):
        return t
    whole = base.shape == t.shape[-1:] and base.stride() == t.stride()[-1:]
    return base if whole else t


class _Terms:
    """ln p of each gene, which is only computed where somebody wants more than its sum."""

    def __init__(
        self,
        x: Tensor,
        recon: tuple[Tensor, ...],
        likelihood: Likelihood,
        terms: Callable[[], Tensor],
    ) -> None:
        self._x, self._recon, self._likelihood, self._terms = x, recon, likelihood, terms

    def sum(self, dim: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        first, x = self._recon[0], self._x
        fits = x.dim() == 2 and first.dim() in (2, 3) and first.shape[-2:] == x.shape
        if dim == -1 and fits and not args and not kwargs:
            recon = self._recon if len(self._recon) > 1 else first
            return fastvae.log_likelihood(recon, x, self._likelihood)
        return self._terms().sum(dim, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terms(), name)

    def __neg__(self) -> Tensor:
        return -self._terms()

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def real(a: Any) -> Any:
            return a._terms() if isinstance(a, cls) else a

        plain = {key: real(value) for key, value in (kwargs or {}).items()}
        return function(*(real(a) for a in args), **plain)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "getitem"):

    def _forward(self: _Terms, other: Any, name: str = f"__{_name}__") -> Any:
        return getattr(self._terms(), name)(other)

    setattr(_Terms, f"__{_name}__", _forward)
