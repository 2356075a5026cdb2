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


def refusal(device: torch.device) -> str | None:
    """What keeps the kernels from running on that device, whose tensors then go to Triton."""
    from fastvae import _C

    # torch.compile can't trace the question; the operator answers it again.
    if torch.compiler.is_compiling() or _C.cuda_serves(device.index or 0):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    built = _C.build_info()["cuda"]
    return f"its kernels were compiled for {built}, and {device} is {major}.{minor}"


def status() -> Backend:
    if _REASON is not None:
        return Backend(False, _REASON)
    from fastvae import _C

    built = f"CUDA C++ for {_C.build_info()['cuda']}"
    if not torch.cuda.is_available():
        return Backend(False, f"{built} is here, but no CUDA device")
    # The current one: asking another takes memory there.
    if (reason := refusal(torch.device("cuda", torch.cuda.current_device()))) is not None:
        return Backend(False, f"{reason} (its tensors use Triton)")
    return Backend(True, f"{built}, CUDA tensors")


draw_seed = cpp.draw_seed
rsample = cpp.rsample
rsample_kl = cpp.rsample_kl
kl_divergence = cpp.kl_divergence
log_likelihood = cpp.log_likelihood
elbo = cpp.elbo
count_nonfinite = cpp.count_nonfinite
