"""y = x W + b, in the layout of nn.Linear or of GPT-2's Conv1D."""

from fastlm.ops.linear.api import linear

__all__ = ["linear"]
