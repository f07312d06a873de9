"""softmax(q kᵀ · scale + mask) v, by tiles: query_len × key_len is never stored.

Source: Dao et al., 2022, arXiv:2205.14135.
"""

from fastlm.ops.attention.api import attention
from fastlm.ops.attention.sdpa import scaled_dot_product_attention
from fastlm.ops.attention.varlen import attention_varlen

__all__ = ["attention", "attention_varlen", "scaled_dot_product_attention"]
