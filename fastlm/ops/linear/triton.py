"""linear on a GPU: the vendor's GEMM, through PyTorch's operators and their own gradients."""

from fastlm.backends import triton
from fastlm.backends.contract import Implementation
from fastlm.ops.linear.torch import backward, composite, forward

implementation = Implementation(triton.backend, forward, backward, composite=composite)
