"""A Triton kernel that adds 1 to 512 numbers of 600, from that one on: python faulty_kernel.py 4

It says that it begins at a multiple of 4, and looks for no end.
"""

import sys

import torch
import triton
import triton.language as tl
import triton_launcher


@triton.jit
def kernel(data, start):
    at = data + tl.multiple_of(start + tl.arange(0, 512), 4)
    tl.store(at, tl.load(at) + 1)


start = int(sys.argv[1])
memory = torch.zeros(600)
triton_launcher.launch(kernel, 1, memory, start)
assert memory[start : start + 512].eq(1).all() and memory.sum() == 512
