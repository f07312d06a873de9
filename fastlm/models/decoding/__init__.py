"""Autoregressive decoding: sampling, the decoding loop over a KV cache, and CUDA graphs of its steps.

It is part of fastlm.models because every causal language model has it as its method `generate`.
"""

from fastlm.models.decoding.loop import Streamer, generate
from fastlm.models.decoding.sampling import Sampling

__all__ = ["Sampling", "Streamer", "generate"]
