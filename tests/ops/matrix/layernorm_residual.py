import functools

import fastlm
from tests.ops.case import WITHOUT_TORCH, Case, normal_inputs


def with_residual(backend):
    return lambda *t: fastlm.layernorm_residual(*t, backend=backend)


def without_residual(backend):
    return lambda x, w, b: fastlm.layernorm_residual(x, None, w, b, backend=backend)[0]


def with_dropout(backend):
    return lambda *t: fastlm.layernorm_residual(*t, dropout_p=0.3, backend=backend)


case = functools.partial(Case, "layernorm_residual", wide_result=True)
INPUTS = normal_inputs((2, 9, 24), (2, 9, 24), (24,), (24,))
CASES = [
    case("layernorm_residual", with_residual, INPUTS, not_cast=(0, 1, 2, 3)),
    case("layernorm", without_residual, normal_inputs((2, 9, 24), (24,), (24,)), not_cast=(0, 1, 2)),
    case("layernorm_residual dropout", with_dropout, INPUTS, WITHOUT_TORCH, dropout=True, not_cast=(0, 1, 2, 3)),
]
