"""rotary in plain PyTorch: the definition, differentiable to any order, never computed in 16 bits."""

import torch
from torch import Tensor

from fastlm.backends import reference
from fastlm.backends.contract import Implementation
from fastlm.backends.reference import widen
from fastlm.core.autocast import no_autocast
from fastlm.ops.rotary.spec import Backward, Forward


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """The first channels of x, rotated in pairs (j, j + half) by the tables, or by the transposed matrix."""
    half = cos.shape[-1] // 2
    wide, cos, sin = widen(x, cos[:, None], sin[:, None])
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    sin_of_first, sin_of_second = sin[..., :half], sin[..., half:]
    if inverse:
        sin_of_first, sin_of_second = -sin_of_second, -sin_of_first
    rotated = first * cos[..., :half] - second * sin_of_first, second * cos[..., half:] + first * sin_of_second
    return torch.cat((*rotated, rest), -1).to(x.dtype)


@no_autocast
def forward(call: Forward):
    return tuple(rotate(x, call.cos, call.sin) for x in (call.query, call.key))


@no_autocast
def backward(call: Backward):
    return tuple(
        rotate(x, call.cos, call.sin, inverse=True) if need else None
        for x, need in zip((call.dquery, call.dkey), call.needed, strict=True)
    )


implementation = Implementation(reference.backend, forward, backward)
