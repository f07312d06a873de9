"""The compiled functions of the backend `cpu` refuse wrong arguments of every operator and name the argument.

tests/build/test_bindings.py tests the error messages one by one.
"""

import re

import pytest
import torch

import fastlm
from fastlm.backends import cpu, isa, registry
from tests.ops.cases import CASES
from tests.support import BACKENDS, as_tuple, floats, implementation_module, targets

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS or not isa.kernels, reason="backend cpu is not under test")

FREED = "expected a tensor with storage, got one whose storage was freed"


def freed(x):
    """A tensor like x whose storage was freed."""
    x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    x.untyped_storage().resize_(0)
    return x


PADDING = torch.ones(2, 9, dtype=torch.bool)
STARTS = torch.tensor([0, 9, 18])
HEADS, TOKENS = {"query": (2, 4, 9, 16), "key": (2, 2, 9, 16), "value": (2, 2, 9, 16)}, (18, 2, 16)
PUBLIC_CALLS = {
    "attention": (
        fastlm.attention,
        {name: floats(*shape) for name, shape in HEADS.items()} | {"mask": floats(1, 1, 9, 9), "key_padding": PADDING},
    ),
    "attention_varlen": (
        lambda query, key, value, **options: fastlm.attention_varlen(query, key, value, STARTS, STARTS, **options),
        {name: floats(*TOKENS) for name in ("query", "key", "value")},
    ),
    "layernorm_residual": (
        fastlm.layernorm_residual,
        {"x": floats(9, 24), "residual": floats(9, 24), "weight": floats(24), "bias": floats(24)},
    ),
    "rms_norm_residual": (
        fastlm.rms_norm_residual,
        {"x": floats(9, 24), "residual": floats(9, 24), "weight": floats(24)},
    ),
    "rotary": (
        lambda query, key, cos, sin, **options: fastlm.rotary(query, key, cos.detach(), sin.detach(), **options),
        {
            "query": floats(2, 4, 9, 16),
            "key": floats(2, 2, 9, 16),
            "cos": floats(1, 9, 16),
            "sin": floats(1, 9, 16),
        },
    ),
    "gelu_mlp": (
        fastlm.gelu_mlp,
        {"x": floats(9, 24), "w1": floats(48, 24), "b1": floats(48), "w2": floats(20, 48), "b2": floats(20)},
    ),
    "glu_mlp": (
        fastlm.glu_mlp,
        {"x": floats(9, 24), "w_gate": floats(48, 24), "w_up": floats(48, 24), "w_down": floats(20, 48)}
        | {"b_gate": floats(48), "b_up": floats(48), "b_down": floats(20)},
    ),
    "contrastive_loss": (
        fastlm.contrastive_loss,
        {"queries": floats(9, 24), "documents": floats(9, 24), "negatives": floats(5, 24), "labels": targets(14, 9)},
    ),
    "linear": (fastlm.linear, {"x": floats(9, 24), "weight": floats(20, 24), "bias": floats(20)}),
    "linear_cross_entropy": (
        lambda **inputs: fastlm.linear_cross_entropy(target=targets(40, 9), **inputs),
        {"x": floats(9, 24), "weight": floats(40, 24), "bias": floats(40)},
    ),
    "linear_log_prob": (
        lambda **inputs: fastlm.linear_log_prob(target=targets(40, 9), **inputs),
        {"x": floats(9, 24), "weight": floats(40, 24), "bias": floats(40)},
    ),
}


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize(
    "name, argument", [(name, argument) for name, (_, inputs) in PUBLIC_CALLS.items() for argument in inputs]
)
def test_an_input_whose_storage_was_freed_is_named(name, argument, needs_gradient):
    """FSDP and others free the storage of parameters that they have moved elsewhere."""
    function, inputs = PUBLIC_CALLS[name]
    inputs = {other: x.clone() for other, x in inputs.items()}
    inputs[argument] = freed(inputs[argument])
    if needs_gradient:
        inputs = {other: x.requires_grad_(x.is_floating_point()) for other, x in inputs.items()}
    with pytest.raises(ValueError, match=f"{argument}: {FREED}"):
        function(**inputs, backend="cpu")


@pytest.mark.parametrize(
    "name, argument",
    [(name, key) for name, (_, inputs) in PUBLIC_CALLS.items() for key, x in inputs.items() if x.is_floating_point()],
)
def test_an_input_with_the_negative_bit_is_named(name, argument):
    """Of x.conj().imag, whose memory holds -x."""
    function, inputs = PUBLIC_CALLS[name]
    with pytest.raises(ValueError, match=f"{argument}: expected a tensor without the negative bit"):
        function(**inputs | {argument: inputs[argument]._neg_view()}, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_weight_whose_storage_was_freed_is_named(dtype):
    with pytest.raises(ValueError, match=f"token_weight: {FREED}"):
        fastlm.linear_cross_entropy(
            floats(9, 24), floats(40, 24), targets(40, 9), token_weight=freed(floats(9).to(dtype)), backend="cpu"
        )


def test_a_parameter_whose_storage_was_freed_is_named():
    p = floats(5).requires_grad_()
    p.grad = floats(5)
    optimizer = fastlm.optim.AdamW([p], backend="cpu")
    optimizer.begin()
    optimizer.state[p]["exp_avg"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"exp_avg: {FREED}"):
        optimizer.step()


class Recorder:
    """The compiled module, which records the keyword arguments of each call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def function(**arguments):
            self.calls.append((name, arguments))
            return getattr(isa.kernels, name)(**arguments)

        return function


@pytest.fixture(scope="module")
def calls():
    """(function, keyword arguments) of calls of every compiled function of every operator."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        for name, operator in registry.operators().items():
            if operator.implements("cpu") and hasattr(implementation_module(name, "cpu"), "kernels"):
                patch.setattr(implementation_module(name, "cpu"), "kernels", recorder)
        for case in CASES:
            if "cpu" in case.backends:
                leaves = case.leaves()
                results = as_tuple(case.call("cpu")(*leaves))
                torch.autograd.grad(results, leaves, [torch.ones_like(y) for y in results])
        parameters = [floats(5, 4).bfloat16().requires_grad_()]
        parameters[0].grad = floats(5, 4).bfloat16()
        fastlm.optim.AdamW(parameters, max_grad_norm=1.0, master_weights=True, backend="cpu").step()
    return recorder.calls


def expect(error, message, function, arguments):
    with pytest.raises(error, match=re.escape(message)):
        getattr(isa.kernels, function)(**arguments)


def with_tensor(arguments, change):
    """(name of a tensor argument, the arguments with change(tensor) in its place), of each; of a list its first."""
    for name, value in arguments.items():
        if torch.is_tensor(value):
            yield name, arguments | {name: change(value)}
        elif isinstance(value, list) and value and torch.is_tensor(value[0]):
            yield name, arguments | {name: [change(value[0]), *value[1:]]}


def test_every_compiled_function_is_called(calls):
    functions = {name for name in dir(isa.kernels) if not name.startswith("_")}
    called = {function for function, _ in calls}
    assert called and called == {name for name in functions if name.endswith(("_forward", "_backward"))} | {
        "adamw",
        "rotary",
        "sum_of_squares",
    }


def test_missing_unknown_and_positional_arguments_are_type_errors(calls):
    for function, arguments in calls:
        for name in arguments:
            others = {other: value for other, value in arguments.items() if other != name}
            expect(TypeError, f"{function}() missing keyword argument '{name}'", function, others)
        extra = arguments | {"unknown": None}
        expect(TypeError, f"{function}() got an unexpected keyword argument 'unknown'", function, extra)
        with pytest.raises(TypeError, match=re.escape(f"{function}() takes keyword arguments only")):
            getattr(isa.kernels, function)(*arguments.values())


def test_a_value_of_another_type_is_a_type_error(calls):
    wrong = {bool: (1, "a bool"), int: (1.5, "an integer"), float: ("1", "a number"), list: (7, "a list")}
    for function, arguments in calls:
        for name, value in arguments.items():
            if type(value) in wrong:
                given, expected = wrong[type(value)]
                message = f"{name}: expected {expected}, got {type(given).__name__}"
                expect(TypeError, message, function, arguments | {name: given})
        for name, changed in with_tensor(arguments, lambda x: "x"):
            expect(TypeError, f"{name}: expected a tensor, got str", function, changed)


def test_a_tensor_whose_storage_was_freed_is_a_value_error(calls):
    for function, arguments in calls:
        for name, changed in with_tensor(arguments, freed):
            expect(ValueError, f"{name}: {FREED}", function, changed)


def test_a_tensor_of_another_dtype_rank_or_device_is_a_value_error(calls):
    for function, arguments in calls:
        for dtype in (torch.int32, torch.float64):
            for name, changed in with_tensor(arguments, lambda x, dtype=dtype: x.to(dtype)):
                expect(ValueError, f"{name}: expected", function, changed)
        if function != "sum_of_squares":  # takes any rank
            for name, changed in with_tensor(arguments, lambda x: x.new_zeros(())):
                if name not in ("parameters", "steps"):  # of any rank, and a scalar
                    expect(ValueError, f"{name}: expected", function, changed)
        for name, changed in with_tensor(arguments, lambda x: x.to("meta")):
            expect(ValueError, f"{name}: expected a tensor on cpu, got one on meta", function, changed)


def test_recorded_calls_succeed_unchanged(calls):
    """So that the errors above come from what was changed."""
    for function, arguments in calls:
        getattr(isa.kernels, function)(**arguments | {"threads": cpu.threads()})
