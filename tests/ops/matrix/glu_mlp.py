import functools

import fastlm
from tests.ops.case import Case, normal_inputs


def call(backend, activation, recompute):
    return lambda *t: fastlm.glu_mlp(*t, activation=activation, recompute=recompute, backend=backend)


INPUTS = normal_inputs((2, 9, 24), (48, 24), (48, 24), (20, 48), (48,), (48,), (20,))
CASES = [
    Case(
        "glu_mlp",
        f"glu_mlp {activation} recompute {level}",
        functools.partial(call, activation=activation, recompute=level),
        INPUTS,
        rounds_weights=True,
    )
    for activation, level in (("silu", 0), ("silu", 1), ("gelu_tanh", 2), ("gelu", 1))
]
