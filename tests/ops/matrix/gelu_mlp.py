import functools

import fastlm
from tests.ops.case import Case, normal_inputs


def call(backend, recompute):
    approximate = "tanh" if recompute else "none"
    return lambda *t: fastlm.gelu_mlp(*t, approximate=approximate, recompute=recompute, backend=backend)


INPUTS = normal_inputs((2, 9, 24), (48, 24), (48,), (20, 48), (20,))
CASES = [
    Case(
        "gelu_mlp", f"gelu_mlp recompute {level}", functools.partial(call, recompute=level), INPUTS, rounds_weights=True
    )
    for level in (0, 1, 2)
]
