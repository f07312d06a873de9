"""linear on a GPU: the vendor's GEMM, through PyTorch's operators and their own gradients."""

from fastlm.backends import cuda
from fastlm.backends.contract import Implementation
from fastlm.ops.linear.torch import backward, composite, forward

implementation = Implementation(cuda.backend, forward, backward, composite=composite)
