"""The Triton kernels. csrc/triton.cpp calls the functions here; the operators check and allocate.

Importing it needs triton; nothing else in the package imports it before the first CUDA tensor.
"""

from fastvae._triton.elbo import elbo_reduce, scale_grad
from fastvae._triton.rowwise import rowwise
from fastvae._triton.sampling import sample_backward, sample_forward
from fastvae._triton.sites import sites

__all__ = ["elbo_reduce", "rowwise", "sample_backward", "sample_forward", "scale_grad", "sites"]
