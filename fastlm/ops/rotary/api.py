"""The public function: checks and documentation."""

import torch
from torch import Tensor

from fastlm.core.errors import check_floating, check_like, check_tensor, mismatch
from fastlm.ops.rotary.autograd import operator
from fastlm.ops.rotary.spec import Forward


def rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions (RoFormer: Su et al., 2021, arXiv:2104.09864).

    Channel j is paired with channel j + rotary_dim/2, as transformers' models do; the channels from rotary_dim on are
    unchanged. In 16 bits the rotation is computed in float32 and rounded once.

    Args:
        query: (batch, heads, tokens, head_dim), floating point, any strides.
        key: (batch, key heads, tokens, head_dim), like query.
        cos: (batch or 1, tokens, rotary_dim) in float32 (float64 for float64): the cosine of each channel's angle, as
            `fastlm.models.rope_tables` gives it. rotary_dim is even and at most head_dim. It gets no gradient.
        sin: like cos.
        backend: force one backend by name; None selects automatically (see fastlm.info()).

    Under autocast nothing is cast.

    Returns:
        (query, key), rotated, contiguous.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        fastlm.Unsupported: no backend, or not the forced one, supports this call; the message lists the reasons.
    """
    for name, x in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        check_tensor(name, x)
    check_floating("query", query)
    shape = query.shape
    if len(shape) != 4 or shape[-1] == 0:
        raise mismatch("query", "shape (batch, heads, tokens, head_dim), head_dim of 1 or more", tuple(shape))
    other = key.shape
    if len(other) != 4 or other[0] != shape[0] or other[2] != shape[2] or other[3] != shape[3]:
        expected = f"shape ({shape[0]}, key heads, {shape[2]}, {shape[3]}), as query"
        raise mismatch("key", expected, tuple(other))
    check_like("key", key, query, "query")
    check_table("cos", cos, query)
    check_table("sin", sin, query)
    if sin.shape != cos.shape:
        raise mismatch("sin", f"shape {tuple(cos.shape)}, as cos", tuple(sin.shape))
    return operator(Forward(query, key, cos, sin), backend)


def check_table(argument: str, table: Tensor, query: Tensor) -> None:
    shape, (batch, _, tokens, head_dim) = table.shape, query.shape
    if len(shape) != 3 or shape[1] != tokens or (shape[0] != 1 and shape[0] != batch):
        batches = f"{batch} or 1" if batch != 1 else "1"
        raise mismatch(argument, f"shape ({batches}, {tokens}, rotary_dim)", tuple(shape))
    rotary_dim = shape[2]
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        expected = f"an even last dimension (rotary_dim) of 2 to {head_dim}, the head_dim of query"
        raise mismatch(argument, expected, rotary_dim)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if table.dtype != dtype or table.device != query.device:
        raise mismatch(argument, f"{dtype} on {query.device}", f"{table.dtype} on {table.device}")
    if table.requires_grad and torch.is_grad_enabled():
        raise mismatch(argument, "a table that requires no gradient", "one that does")
