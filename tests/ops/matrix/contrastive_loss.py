import functools

import torch

import fastlm
from tests.ops.case import Case, normal_inputs


def call(backend, **options):
    return lambda q, d, n=None: fastlm.contrastive_loss(q, d, negatives=n, **options, backend=backend)


CASES = [
    Case(
        "contrastive_loss",
        f"contrastive_loss {name}",
        functools.partial(call, **options),
        normal_inputs(*shapes),
        fixed="labels" in options,
        wide_result=True,
        vendor_gemm=True,  # on a GPU it launches the kernels of linear_cross_entropy
    )
    for name, shapes, options in (
        ("in batch", ((9, 24), (9, 24)), {}),
        ("negatives", ((9, 24), (9, 24), (5, 24)), {"temperature": 0.3}),
        (
            "labels",
            ((9, 24), (9, 24), (5, 24)),
            {"labels": torch.tensor([0, 13, 2, -100, 2, 8, 9, 1, -100]), "temperature": 0.3},
        ),
    )
]
