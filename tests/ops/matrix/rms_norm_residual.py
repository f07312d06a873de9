import functools

import fastlm
from tests.ops.case import WITHOUT_TORCH, Case, normal_inputs


def with_residual(backend):
    return lambda *t: fastlm.rms_norm_residual(*t, backend=backend)


def of_heads(backend):
    return lambda x, w: fastlm.rms_norm_residual(x.transpose(1, 2), None, w, unit_offset=True, backend=backend)[0]


def with_dropout(backend):
    return lambda *t: fastlm.rms_norm_residual(*t, dropout_p=0.3, backend=backend)


case = functools.partial(Case, "rms_norm_residual", wide_result=True)
INPUTS = normal_inputs((2, 9, 24), (2, 9, 24), (24,))
CASES = [
    case("rms_norm_residual", with_residual, INPUTS, not_cast=(0, 1, 2)),
    case("rms_norm of heads", of_heads, normal_inputs((2, 9, 3, 8), (8,)), not_cast=(0, 1)),
    case("rms_norm_residual dropout", with_dropout, INPUTS, WITHOUT_TORCH, dropout=True, not_cast=(0, 1, 2)),
]
