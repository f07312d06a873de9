import functools

import fastlm
from tests.ops.case import Case, normal_inputs
from tests.support import floats, targets

TARGETS = targets(40, 2, 9, ignored=[4])


def call(backend, **options):
    return lambda x, w, b: fastlm.linear_cross_entropy(x, w, TARGETS, b, **options, backend=backend)


OPTIONS = {
    "mean": {"label_smoothing": 0.1},
    "none": {"label_smoothing": 0.1, "reduction": "none"},
    "capped sum": {"token_weight": floats(2, 9).abs(), "logit_scale": 1.5, "softcap": 2.0, "reduction": "sum"},
}
CASES = [
    Case(
        "linear_cross_entropy",
        f"linear_cross_entropy {name}",
        functools.partial(call, **options),
        normal_inputs((2, 9, 24), (40, 24), (40,)),
        fixed=True,
        rounds_weights=True,
        wide_result=True,
    )
    for name, options in OPTIONS.items()
]
