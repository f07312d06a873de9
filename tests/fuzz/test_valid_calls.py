"""Random right calls of every operator: sizes, strides, masks, scales and extreme values, forward and backward.

The rule is the project's: at most twice the error of PyTorch's operator in the same dtype, against float64, and FLOOR.
The error of one small problem is luck, PyTorch's too. So the rule holds for the median of the problems, and for every
single one with SINGLE instead of two. PyTorch's error is taken as at least half a unit in the last place: a result that
is rounded once may be off by as much. Where ours is more than twice PyTorch's, PyTorch's is taken as the largest of up
to NEIGHBOURS problems more: the sums in another order, each tensor and the upstream gradients times a number near 1, so
that everything rounds otherwise. Before a single one fails there are MORE of them.

There are FASTLM_TEST_EXAMPLES problems of each operator: 2000 with FASTLM_TEST_FUZZ=all, otherwise 20, the same ones at
every run.
"""

import math
import os
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastlm
from tests.fuzz.draw import Draw, large, normal, outlier, wide, zeros
from tests.fuzz.problems import PROBLEMS, Problem
from tests.support import BACKENDS, FLOOR, SLOW, on_backends, outputs_and_gradients

ALL = os.environ.get("FASTLM_TEST_FUZZ") == "all"
EXAMPLES = int(os.environ.get("FASTLM_TEST_EXAMPLES", 2000 if ALL else 20))
NEIGHBOURS, MORE = 4, 40
SINGLE = 16  # a wrong result is off by far more


def distance(a: Tensor, truth: Tensor, counted: Tensor, noise: float, underflow: int = 1, terms: float = 0.0) -> float:
    """The largest error where `counted`, relative to the largest true value; infinite for a NaN.

    It is absolute where the true values are at most `noise`, and relative to `terms` if these are larger. So many
    halves of the distance of subnormal numbers are no error. An infinity counts as the first number beyond the largest:
    what rounds to it may be close to that. It is no error beside true values that overflow: a sum may overflow before
    its last term.
    """
    limits = torch.finfo(a.dtype)
    subnormal = underflow * limits.tiny * limits.eps / 2
    largest = torch.where(truth.isfinite(), truth, 0).abs().max().item() if truth.numel() else 0.0
    if largest > limits.max:
        counted = counted & ~a.isinf()
    a = torch.where(a.isinf(), a.sign().double() * limits.max * (1 + limits.eps), a.double())
    errors = (
        torch.where((a == truth) | ~counted, 0, (a - truth).abs() - subnormal).clamp(min=0).nan_to_num(nan=math.inf)
    )
    return (errors.max().item() if errors.numel() else 0.0) / max(terms, largest if largest > noise else 1.0)


def noise_of_float64(inputs: list[Tensor | None]) -> float:
    """True values that are no larger may be a hundred roundings of float64, of products of two inputs that cancel."""
    largest = max((x.double().abs().max().item() for x in inputs if x is not None and x.numel()), default=0.0)
    return max(1e-12, 100 * 2**-52 * largest**2)


def scaled(inputs: list[Tensor | None]) -> list[Tensor | None]:
    """Each tensor times a number near 1."""
    return [x if x is None else (x * near_1()).to(x.dtype) for x in inputs]


def near_1() -> float:
    return torch.empty(()).uniform_(0.95, 1.05).item()


def check(problem: Problem, dtype: torch.dtype, backend: str) -> list[float]:
    """The ratio of our error to the one that the rule allows, for each result."""

    def torch_and_truth(inputs, factor=1.0):
        widened = [x if x is None else x.double() for x in inputs]
        exact = outputs_and_gradients(problem.torch_own, widened, torch.float64, dtype, factor)
        return outputs_and_gradients(problem.torch_own, inputs, dtype, upstream_factor=factor), exact

    noise = noise_of_float64(problem.inputs)

    def errors_of_torch(theirs, truths):
        half_a_unit = torch.finfo(dtype).eps / 2
        return [max(distance(b, t, b.isfinite(), noise), half_a_unit) for b, t in zip(theirs, truths, strict=True)]

    def error_of(a, truth, counted, terms=0.0):
        return distance(a, truth, counted, noise, problem.underflow, terms)

    ours = outputs_and_gradients(lambda *t: problem.ours(*t, backend=backend), problem.inputs, dtype)
    theirs, truths = torch_and_truth(problem.inputs)
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    errors = [error_of(a, t, b.isfinite()) for a, b, t in zip(ours, theirs, truths, strict=True)]
    bounds = errors_of_torch(theirs, truths)
    for tried in range(MORE):
        factor = 2 if tried < NEIGHBOURS else SINGLE
        if all(error <= factor * bound + FLOOR[dtype] for error, bound in zip(errors, bounds, strict=True)):
            break
        more = errors_of_torch(*torch_and_truth(scaled(problem.shuffle()), near_1()))
        bounds = [max(pair) for pair in zip(bounds, more, strict=True)]
    for i, (a, b, truth, error, bound) in enumerate(zip(ours, theirs, truths, errors, bounds, strict=True)):
        assert error <= SINGLE * bound + FLOOR[dtype], f"result {i}: error {error:.2e}, torch's {bound:.2e}"
        # Where PyTorch overflows, so may we; a finite result must be right all the same.
        error = error_of(a, truth, ~b.isfinite() & a.isfinite(), problem.terms.get(i, 0.0))
        allowed = max(SINGLE * bound + FLOOR[dtype], 2**-6)
        assert error <= allowed, f"result {i}: error {error:.2e} where torch's is not finite"
    return [error / (2 * bound + FLOOR[dtype]) for error, bound in zip(errors, bounds, strict=True)]


def on_examples(test: Callable[[Draw], None]) -> None:
    """Calls the test with EXAMPLES draws, the same ones at every run."""

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),  # shrinking takes minutes; the message has all that was drawn
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def run(data):
        test(Draw(data))

    run()


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.__name__)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if ALL or name not in SLOW])
def test_errors_are_at_most_twice_those_of_torch(problem, backend):
    ratios = []
    on_examples(lambda draw: ratios.extend(check(problem(draw), draw.dtype, backend)))
    assert statistics.median(ratios) <= 1


@on_backends("reference", "torch", "cpu")
def test_steps_of_adamw(backend):
    """The same rule for parameters and moments after some steps with random settings."""
    ratios = []

    def check_steps(draw):
        options = {
            "lr": draw.one_of((1e-3, 0.1, 0.0), "lr"),
            "betas": (draw.one_of((0.9, 0.0), "beta1"), draw.one_of((0.999, 0.5), "beta2")),
            # Second moments that float16 rounds to 0 are divided by eps alone.
            "eps": draw.one_of((1e-3,) if draw.dtype == torch.float16 else (1e-8, 1e-3), "eps"),
            "weight_decay": draw.one_of((0.0, 0.1), "weight_decay"),
            "maximize": draw.one_of((False, True), "maximize"),
        }
        shape = draw.size(9, "rows"), draw.size(400, "columns")
        start = draw.tensor(*shape, label="parameter").contiguous()
        values = normal, wide, outlier, large, zeros
        gradients = [draw.tensor(*shape, label="gradient", values=values) for _ in range(draw.size(3, "steps"))]

        def after_steps(kind, dtype, **more):
            p = start.to(dtype).clone().requires_grad_()
            optimizer = kind([p], **options, **more)
            for gradient in gradients:
                p.grad = gradient.to(dtype)
                optimizer.step()
            return [p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]]

        ours = after_steps(fastlm.optim.AdamW, draw.dtype, backend=backend)
        theirs = after_steps(torch.optim.AdamW, draw.dtype, fused=True)
        truths = after_steps(torch.optim.AdamW, torch.float64)
        for i, (a, b, truth) in enumerate(zip(ours, theirs, truths, strict=True)):
            counted = b.isfinite()
            bound = max(distance(b, truth, counted, 1e-12), torch.finfo(draw.dtype).eps / 2)
            error = distance(a, truth, counted, 1e-12)
            assert error <= SINGLE * bound + FLOOR[draw.dtype], f"result {i}: error {error:.2e}, torch's {bound:.2e}"
            ratios.append(error / (2 * bound + FLOOR[draw.dtype]))

    on_examples(check_steps)
    assert statistics.median(ratios) <= 1
