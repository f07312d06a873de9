import functools

import fastlm
from tests.ops.case import Case, normal_inputs
from tests.support import targets

TARGETS = targets(40, 2, 9, ignored=[4])


def call(backend, reduction):
    return lambda x, w, b: fastlm.linear_cross_entropy(
        x, w, TARGETS, b, reduction=reduction, label_smoothing=0.1, backend=backend
    )


CASES = [
    Case(
        "linear_cross_entropy",
        f"linear_cross_entropy {reduction}",
        functools.partial(call, reduction=reduction),
        normal_inputs((2, 9, 24), (40, 24), (40,)),
        fixed=True,
        rounds_weights=True,
        wide_result=True,
    )
    for reduction in ("mean", "none")
]
