"""The test matrix: small cases of every operator, for the promises that all operators make.

The cases of an operator are in tests/ops/matrix/<operator>.py. The registry says which operators there are.
"""

import functools
import importlib

import pytest
import torch

from fastlm.backends import registry
from fastlm.ops.operator import Operator
from tests.ops.case import Case
from tests.support import BACKENDS


def cases_of(operator: str) -> list[Case]:
    cases = importlib.import_module(f"tests.ops.matrix.{operator}").CASES
    assert cases and all(case.operator == operator for case in cases), operator
    return cases


CASES = [
    case
    for name, operator in registry.operators().items()
    if isinstance(operator, Operator)  # not one that updates its arguments, such as AdamW's
    for case in cases_of(name)
]


def on_every_case(test=None, *, backends=("reference", "torch", "cpu"), dropout=True):
    """Parametrise a test by all cases and the backends of this run that support them, or some of these.

    dropout=False leaves out the cases with dropout. A test of what happens before a backend is selected need not run in
    Triton's interpreter, which is slow.
    """
    if test is None:
        return functools.partial(on_every_case, backends=backends, dropout=dropout)
    pairs = [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in CASES
        if dropout or not case.dropout
        for name in BACKENDS
        if name in case.backends and name in backends
    ]
    return pytest.mark.parametrize("case, backend", pairs)(test)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def float64_leaves(case: Case) -> list[torch.Tensor]:
    """Inputs for gradcheck, which perturbs one element at a time: the smallest with an interior and an edge."""
    leaves = [x.detach().double() for x in case.inputs(torch.float32)]
    if case.smallest is not None:
        leaves = [case.smallest(x) for x in leaves]
    return [x.requires_grad_() for x in leaves]
