"""Transformers, faster on the machine you have. fastlm.info() shows which backends are available on it."""

import warnings

from fastlm.core import interrupts

if interrupts.is_command():
    interrupts.stop_quietly()

from fastlm import optim
from fastlm._version import __version__
from fastlm.allocator import tune_allocator
from fastlm.backends import Unsupported, isa, use_backend
from fastlm.info import info
from fastlm.integrations.api import accelerate, report, restore
from fastlm.integrations.encoding.api import encode, rerank
from fastlm.ops.attention import attention, attention_varlen, scaled_dot_product_attention
from fastlm.ops.contrastive_loss import contrastive_loss
from fastlm.ops.gelu_mlp import gelu_mlp
from fastlm.ops.glu_mlp import glu_mlp
from fastlm.ops.layernorm_residual import layernorm_residual
from fastlm.ops.linear import linear
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.linear_log_prob import linear_log_prob
from fastlm.ops.rms_norm_residual import rms_norm_residual
from fastlm.ops.rotary import rotary
from fastlm.warmup import warmup

__all__ = [
    "Unsupported",
    "__version__",
    "accelerate",
    "attention",
    "attention_varlen",
    "contrastive_loss",
    "encode",
    "gelu_mlp",
    "glu_mlp",
    "info",
    "layernorm_residual",
    "linear",
    "linear_cross_entropy",
    "linear_log_prob",
    "optim",
    "report",
    "rerank",
    "restore",
    "rms_norm_residual",
    "rotary",
    "scaled_dot_product_attention",
    "tune_allocator",
    "use_backend",
    "warmup",
]

if isa.kernels is None and not isa.wrong_isa:
    warnings.warn(
        f"fastlm: no compiled kernels ({isa.missing}); PyTorch's own operators are used instead. See fastlm.info().",
        RuntimeWarning,
        stacklevel=2,
    )
