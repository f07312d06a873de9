"""s = residual + dropout(x), y = LayerNorm(s) · weight + bias."""

from fastlm.ops.layernorm_residual.api import layernorm_residual

__all__ = ["layernorm_residual"]
