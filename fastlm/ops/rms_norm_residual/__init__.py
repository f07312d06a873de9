"""s = residual + dropout(x), y = s / √(mean(s²) + eps) · weight."""

from fastlm.ops.rms_norm_residual.api import rms_norm_residual

__all__ = ["rms_norm_residual"]
