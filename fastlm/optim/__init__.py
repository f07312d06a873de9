"""Optimisers: drop-in replacements for torch.optim's, one pass over memory for a step."""

from fastlm.optim.adamw import AdamW

__all__ = ["AdamW"]
