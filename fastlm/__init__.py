"""GPT-2 and BERT, faster on the machine you have: see fastlm.info() for what serves here."""

import warnings

from fastlm import optim
from fastlm._version import __version__
from fastlm.allocator import tune_allocator
from fastlm.backends import Unsupported, isa, use_backend
from fastlm.info import info
from fastlm.integrations import accelerate, report, restore
from fastlm.ops.attention import attention
from fastlm.ops.attention_varlen import attention_varlen
from fastlm.ops.gelu_mlp import gelu_mlp
from fastlm.ops.layernorm_residual import layernorm_residual
from fastlm.ops.linear import linear
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.scaled_dot_product_attention import scaled_dot_product_attention
from fastlm.warmup import warmup

__all__ = [
    "Unsupported",
    "__version__",
    "accelerate",
    "attention",
    "attention_varlen",
    "gelu_mlp",
    "info",
    "layernorm_residual",
    "linear",
    "linear_cross_entropy",
    "optim",
    "report",
    "restore",
    "scaled_dot_product_attention",
    "tune_allocator",
    "use_backend",
    "warmup",
]

if isa.kernels is None:
    warnings.warn(
        f"fastlm: no compiled kernels ({isa.missing}); PyTorch's own operators serve instead. See fastlm.info().",
        RuntimeWarning,
        stacklevel=2,
    )
