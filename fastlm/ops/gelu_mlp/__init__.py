"""y = gelu(x W1 + b1) W2 + b2: the feed-forward block."""

from fastlm.ops.gelu_mlp.api import gelu_mlp

__all__ = ["gelu_mlp"]
