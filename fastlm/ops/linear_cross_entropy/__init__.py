"""The cross-entropy of x Wᵀ + b against targets, by chunks of rows."""

from fastlm.ops.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
