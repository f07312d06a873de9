"""linear_log_prob."""

from fastlm.ops.linear_log_prob.api import linear_log_prob

__all__ = ["linear_log_prob"]
