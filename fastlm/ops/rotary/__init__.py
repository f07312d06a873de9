"""Rotary positions of queries and keys."""

from fastlm.ops.rotary.api import rotary

__all__ = ["rotary"]
