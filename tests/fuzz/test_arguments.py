"""Every public function with every argument wrong in every way: an error that names it, never a crash or a silence.

The values come from type hints (values.py); calls run in forked processes (forked.py). `make test` runs a sample,
FASTLM_TEST_FUZZ=all every call.
"""

import functools
import inspect
import os
import random
import re
import signal
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.backends import registry
from tests.fuzz import functions, values
from tests.fuzz.forked import Outcome, outcomes
from tests.fuzz.functions import FUNCTIONS, OPERATORS, Function, parameters_of

ALL = os.environ.get("FASTLM_TEST_FUZZ") == "all"
SAMPLE = 600  # calls in `make test`
ERRORS = (TypeError, ValueError, OverflowError, OSError, fastlm.Unsupported)
BACKENDS = (None, "cpu", "torch", "reference")
TOLERANCE = 2**-6  # of the largest value: a wrong result, and not rounding, which other tests bound
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Call(NamedTuple):
    function: str
    argument: str
    wrong: str  # what is wrong
    backend: str | None
    dtype: torch.dtype
    gradient: bool

    def __str__(self):
        where = f" ({self.backend or 'auto'}, {self.dtype}{', gradient' if self.gradient else ''})"
        return f"{self.function}: {self.argument} = {self.wrong}" + (where if self.is_operator else "")

    @property
    def is_operator(self) -> bool:
        return any(self.function == operator.name for operator in OPERATORS)


def base(function: Function, dtype: torch.dtype, gradient: bool) -> dict[str, Any]:
    """The arguments of a right call."""

    def cast(name: str, x: Any) -> Any:
        if name in function.tables:
            return x.to(torch.promote_types(dtype, torch.float32))
        if not isinstance(x, Tensor) or not x.is_floating_point() or function not in OPERATORS:
            return x
        return x.to(dtype).requires_grad_(gradient)

    return {name: cast(name, value) for name, value in function.arguments().items()}


def ways(function: Function, argument: str, dtype: torch.dtype) -> dict[str, Any]:
    """What can be wrong with an argument → a function that makes the value."""
    given = base(function, dtype, False).get(argument, parameters_of(function)[argument])
    hint = function.hints[argument]
    return dict(values.wrong_values(hint, given))


def calls() -> list[Call]:
    found = []
    for function in FUNCTIONS:
        variants = [(None, torch.float32, False)]
        if function in OPERATORS:
            variants = [(b, d, g) for b in BACKENDS for d in DTYPES for g in (False, True)]
        for backend, dtype, gradient in variants:
            for argument in parameters_of(function):
                for wrong in ways(function, argument, dtype):
                    found.append(Call(function.name, argument, wrong, backend, dtype, gradient))
    return found


def sample() -> list[Call]:
    """All calls, or some of each function: of each argument first, then of all."""
    every = calls()
    if ALL:
        return every
    chosen = random.Random(0)
    chosen.shuffle(every)
    seen: set = set()
    first = [call for call in every if (key := (call.function, call.argument)) not in seen and not seen.add(key)]
    rest = [call for call in every if call not in set(first)]
    return first + rest[: max(0, SAMPLE - len(first))]


def attempt(call: Call) -> str:
    """What is wrong with the outcome of a call; "" if nothing is."""
    warnings.simplefilter("ignore")
    function = next(f for f in FUNCTIONS if f.name == call.function)
    arguments = base(function, call.dtype, call.gradient)
    value = arguments[call.argument] = ways(function, call.argument, call.dtype)[call.wrong]()
    if function in OPERATORS and call.argument != "backend":
        arguments["backend"] = call.backend
    try:
        result = function.call(**arguments)
    except ERRORS as error:
        return complaint(call, error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return silence(function, call, arguments, value, result)


def complaint(call: Call, error: Exception) -> str:
    """An error must be one line that names the argument, a file, or the operator that no backend supports."""
    if isinstance(error, OSError) and error.filename:
        return ""
    message = str(error)
    name = next(f for f in FUNCTIONS if f.name == call.function).names.get(call.argument, call.argument)
    unsupported = isinstance(error, fastlm.Unsupported) and message.partition(" on ")[0] in registry.operators()
    if not re.search(rf"\b{name}\b", message) and not unsupported:
        return f"{type(error).__name__} does not name it: {message[:300]}"
    if "\n" in message or len(message) > 1000:
        return f"more than a line: {message[:300]}"
    return ""


def silence(function: Function, call: Call, arguments: dict[str, Any], value: Any, result: Any) -> str:
    """An accepted value must be of the type hint, and the result of an operator that of its definition."""
    if not values.fits(value, function.hints[call.argument]):
        return "was accepted"
    if function.definition is None:
        return ""
    defaults = {name: default for name, default in parameters_of(function).items() if name != "backend"}
    given = defaults | {name: value for name, value in arguments.items() if name != "backend"}
    if given.get("dropout_p"):
        return ""  # random
    tensors = [x for x in given.values() if isinstance(x, Tensor)]
    if any(x.is_meta for x in tensors):
        return "" if all(x.is_meta for x in tensors) else "was accepted"
    wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in given.items()}
    try:
        truth = function.definition(**wide)
    except Exception as error:
        return f"was accepted, where the definition says {type(error).__name__}: {error}"
    for ours, true in zip(as_tuple(result), as_tuple(truth), strict=True):
        if ours.shape != true.shape:
            return f"gave shape {tuple(ours.shape)}, the definition {tuple(true.shape)}"
        floor = TOLERANCE * largest(true) + torch.finfo(torch.float32).tiny  # smaller results may be 0 in 32 bits
        close = torch.isclose(ours.detach().double(), true, TOLERANCE, floor, equal_nan=True)
        if not close.all():
            return f"gave {ours.flatten()[:3].tolist()}, the definition {true.flatten()[:3].tolist()}"
    return ""


def largest(x: Tensor) -> float:
    finite = x.detach()[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def as_tuple(results: Any) -> tuple:
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_the_calls_are_right_before_they_are_changed(function):
    for dtype in DTYPES if function in OPERATORS else DTYPES[:1]:
        result = function.call(**base(function, dtype, False))
        call = Call(function.name, next(iter(parameters_of(function))), "", None, dtype, False)
        if function.definition is not None:
            value = function.arguments()[call.argument]
            assert silence(function, call, base(function, dtype, False), value, result) == ""


def test_every_public_function_is_called():
    public = {name: value for name, value in vars(fastlm).items() if name in fastlm.__all__}
    with_arguments = {n for n, f in public.items() if inspect.isfunction(f) and inspect.signature(f).parameters}
    assert with_arguments and with_arguments <= {function.name for function in FUNCTIONS}


def test_a_call_that_crashes_or_ends_its_process_is_an_outcome():
    calls = [lambda: 1, lambda: os.kill(os.getpid(), signal.SIGSEGV), lambda: 2, lambda: os._exit(0), lambda: 3]
    crashes = "ended by SIGSEGV", "ended its process"
    assert outcomes(calls) == [Outcome(1), Outcome(crash=crashes[0]), Outcome(2), Outcome(crash=crashes[1]), Outcome(3)]


def test_a_wrong_argument_is_an_error_that_names_it():
    chosen = sample()
    assert len(chosen) >= (20_000 if ALL else 500)
    functions.transformers_model(), functions.saved_model()  # once, for all processes
    results = outcomes([functools.partial(attempt, call) for call in chosen])
    failures = [
        f"{call}: {outcome.crash or outcome.result}"
        for call, outcome in zip(chosen, results, strict=True)
        if outcome.crash or outcome.result
    ]
    assert not failures, f"{len(failures)} of {len(chosen)} calls:\n" + "\n".join(failures)
