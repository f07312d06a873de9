import functools

import torch

import fastlm
from tests.ops.case import Case, normal_inputs


def tables(tokens, rotary_dim, like):
    options = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    angles = torch.arange(tokens, **options)[None, :, None] * 0.3 + torch.arange(rotary_dim, **options) * 0.1
    return angles.cos(), angles.sin()


def whole(backend):
    return lambda q, k: fastlm.rotary(q, k, *tables(q.shape[2], q.shape[3], q), backend=backend)


def partial(backend):
    return lambda q, k: fastlm.rotary(q.transpose(1, 2), k.transpose(1, 2), *tables(9, 4, q), backend=backend)


case = functools.partial(Case, "rotary", wide_result=True, not_cast=(0, 1))
CASES = [
    case("rotary", whole, normal_inputs((2, 4, 9, 8), (2, 2, 9, 8))),
    case("rotary partial", partial, normal_inputs((2, 9, 3, 8), (2, 9, 1, 8)), fixed=True),
]
