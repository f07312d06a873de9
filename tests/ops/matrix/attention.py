import functools

import torch

import fastlm
from tests.ops.case import WITHOUT_TORCH, Case, normal_inputs

PADDING = torch.arange(9) < torch.tensor([[9], [6]])
DENSE = (2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16)
PACKED = (18, 4, 16), (18, 2, 16), (18, 2, 16)
STARTS, KEY_STARTS = torch.tensor([0, 9, 10, 10, 18]), torch.tensor([0, 7, 8, 11, 18])


def plain(backend):
    return lambda q, k, v: fastlm.attention(q, k, v, backend=backend)


def masked(backend):
    options = {"causal": True, "key_padding": PADDING, "window": (5, None), "backend": backend}
    return lambda q, k, v: fastlm.attention(q, k, v, **options)


def everything(backend):
    options = {"causal": True, "dropout_p": 0.2, "return_lse": True, "backend": backend}
    return lambda q, k, v, mask: fastlm.attention(q, k, v, mask=mask, **options)


def capped(backend):
    options = {"causal": True, "key_padding": PADDING, "softcap": 1.5, "return_lse": True, "backend": backend}
    return lambda q, k, v, mask: fastlm.attention(q, k, v, mask=mask, **options)


def packed(backend):
    return lambda q, k, v: fastlm.attention_varlen(q, k, v, STARTS, STARTS, causal=True, backend=backend)


def packed_everything(backend):
    options = {"window": (3, 2), "dropout_p": 0.2, "return_lse": True, "backend": backend}
    return lambda q, k, v: fastlm.attention_varlen(q, k, v, STARTS, KEY_STARTS, **options)


def packed_capped(backend):
    return lambda q, k, v: fastlm.attention_varlen(q, k, v, STARTS, KEY_STARTS, softcap=1.5, backend=backend)


def sdpa(backend):
    options = {"is_causal": True, "enable_gqa": True, "backend": backend}
    return lambda q, k, v: fastlm.scaled_dot_product_attention(q, k, v, **options)


def corner(x):
    return x[(slice(2),) * min(2, x.dim() - 1)]


case = functools.partial(Case, "attention")
dense, tokens = normal_inputs(*DENSE), normal_inputs(*PACKED)
CASES = [
    case("attention", plain, dense, smallest=corner),
    case("attention masked", masked, dense, fixed=True, smallest=corner),
    case(
        "attention all",
        everything,
        normal_inputs(*DENSE, (1, 4, 9, 9)),
        WITHOUT_TORCH,
        dropout=True,
        not_cast=(3,),
        smallest=corner,
    ),
    case(
        "attention capped",
        capped,
        normal_inputs(*DENSE, (1, 4, 9, 9)),
        WITHOUT_TORCH,
        fixed=True,
        not_cast=(3,),
        smallest=corner,
    ),
    case("packed attention", packed, tokens, fixed=True),
    case("packed attention all", packed_everything, tokens, WITHOUT_TORCH, dropout=True, fixed=True),
    case("packed attention capped", packed_capped, tokens, WITHOUT_TORCH, fixed=True),
    case("sdpa", sdpa, dense),
]
