import functools

import fastlm
from tests.ops.case import Case, normal_inputs


def call(backend, layout):
    return lambda x, w, b: fastlm.linear(x, w, b, layout=layout, backend=backend)


case = functools.partial(Case, "linear", rounds_weights=True, vendor_gemm=True)
CASES = [
    case("linear", lambda b: call(b, "linear"), normal_inputs((2, 9, 24), (20, 24), (20,))),
    case("linear conv1d", lambda b: call(b, "conv1d"), normal_inputs((2, 9, 24), (24, 20), (20,))),
]
