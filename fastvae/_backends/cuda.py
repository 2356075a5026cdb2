"""The CUDA backend: CUDA tensors through torch.ops.fastvae, whose CUDA side is csrc/cuda."""

import torch

from fastvae._backends import cpp
from fastvae._backends._common import Backend


def _look() -> str | None:
    if not cpp.status().available:
        return "its kernels are part of the C++ extension, and " + cpp.status().detail
    from fastvae import _C

    if _C.build_info().get("cuda") is None:
        return (
            "the extension was built without it: that takes a CUDA build of torch and nvcc "
            "(CUDA tensors use Triton)"
        )
    return None


_REASON = _look()


def missing() -> str | None:
    """What keeps the kernels from running, whatever the device."""
    return _REASON


def status() -> Backend:
    if _REASON is not None:
        return Backend(False, _REASON)
    from fastvae import _C

    built = f"CUDA C++ for {_C.build_info()['cuda']}"
    if not torch.cuda.is_available():
        return Backend(False, f"{built} is here, but no CUDA device")
    return Backend(True, f"{built}, CUDA tensors")


draw_seed = cpp.draw_seed
rsample = cpp.rsample
rsample_kl = cpp.rsample_kl
kl_divergence = cpp.kl_divergence
log_likelihood = cpp.log_likelihood
elbo = cpp.elbo
count_nonfinite = cpp.count_nonfinite
