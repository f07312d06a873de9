import functools

import fastlm
from tests.ops.case import Case, normal_inputs
from tests.support import targets

TARGETS = targets(40, 2, 9, ignored=[4])


def call(backend, **options):
    return lambda x, w, b: fastlm.linear_log_prob(x, w, TARGETS, b, **options, backend=backend)


CASES = [
    Case(
        "linear_log_prob",
        f"linear_log_prob{name}",
        functools.partial(call, **options),
        normal_inputs((2, 9, 24), (40, 24), (40,)),
        fixed=True,
        rounds_weights=True,
        wide_result=True,
    )
    for name, options in {"": {}, " capped": {"temperature": 0.7, "softcap": 2.0}}.items()
]
