"""What the checks of arguments say, of every operator and of the optimiser. tests/fuzz tries all other wrong values."""

import re
import subprocess
import sys

import numpy
import pytest
import torch

import fastlm
from fastlm.backends import cpu, isa
from tests.fuzz import functions, values

X, W = torch.ones(3, 4), torch.ones(5, 4)
HEADS = torch.ones(1, 1, 3, 8)
TARGET = torch.tensor([0, 1, 2])


def attention(**options):
    return fastlm.attention(HEADS, HEADS, HEADS, **options)


def loss(**options):
    return fastlm.linear_cross_entropy(X, W, TARGET, **options)


WRONG = {
    "x: expected a tensor, got list": lambda: fastlm.linear([1.0], W),
    "weight: expected a tensor, got None": lambda: fastlm.linear(X, None),
    "query: expected a tensor, got ndarray": lambda: fastlm.attention(HEADS.numpy(), HEADS, HEADS),
    "w1: expected a dense tensor, got one of layout torch.sparse_coo": lambda: fastlm.gelu_mlp(
        X, W.to_sparse(), None, W.t(), None
    ),
    "key: expected a dense tensor, got a nested one": lambda: fastlm.attention(
        HEADS, torch.nested.nested_tensor([HEADS[0]]), HEADS
    ),
    "x: expected one of torch.float32, torch.bfloat16, torch.float16, torch.float64, got torch.float8_e4m3fn": lambda: (
        fastlm.linear(X.to(torch.float8_e4m3fn), W)
    ),
    "causal: expected True or False, got 'false'": lambda: attention(causal="false"),
    "return_lse: expected True or False, got 1": lambda: attention(return_lse=1),
    "scale: expected a finite number, got 'x'": lambda: attention(scale="x"),
    "scale: expected a finite number, got an integer of 1329 bits": lambda: attention(scale=10**400),
    "scale: expected a number that is finite in float32, got 1e+300": lambda: attention(scale=1e300),
    "scale: expected a finite number, got a torch.float32 tensor of 0 dimensions that requires a gradient": lambda: (
        attention(scale=torch.tensor(0.5, requires_grad=True))
    ),
    "dropout_p: expected a probability in [0, 1), got None": lambda: attention(dropout_p=None),
    "window: expected (left, right), each None or an integer of 0 or more, got ('x', 0)": lambda: attention(
        window=("x", 0)
    ),
    "eps: expected a finite number above 0, got None": lambda: fastlm.layernorm_residual(X, None, X[0], eps=None),
    "ignore_index: expected a 64-bit integer, got None": lambda: loss(ignore_index=None),
    "ignore_index: expected a 64-bit integer, got 1.5": lambda: loss(ignore_index=1.5),
    "ignore_index: expected a 64-bit integer, got 9223372036854775808": lambda: loss(ignore_index=2**63),
    "recompute: expected one of 0, 1, 2, got True": lambda: fastlm.gelu_mlp(X, W, None, W.t(), None, recompute=True),
    "key: expected the head_dim of query, 8, got 4": lambda: fastlm.scaled_dot_product_attention(
        HEADS, HEADS[..., :4], HEADS[..., :4]
    ),
    "lr: expected a finite number of 0 or more, got 'x'": lambda: fastlm.optim.AdamW([X], lr="x"),
    "betas: expected two numbers in [0, 1), got 1.0": lambda: fastlm.optim.AdamW([X], betas=(0.9, 1.0)),
    "betas: expected two numbers in [0, 1), got (0.9,)": lambda: fastlm.optim.AdamW([X], betas=(0.9,)),
    "amsgrad: expected True or False, got 'false'": lambda: fastlm.optim.AdamW([X], amsgrad="false"),
    "model: expected a module, got 'gpt2'": lambda: fastlm.accelerate("gpt2"),
    "attention: expected True or False, got 'false'": lambda: fastlm.accelerate(
        torch.nn.Linear(2, 2), attention="false"
    ),
}


@pytest.mark.parametrize("message, call", WRONG.items())
def test_a_wrong_argument_is_named(message, call):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        call()


def test_a_window_may_be_as_large_as_integers_are():
    expected = attention(window=(None, 0))
    assert torch.equal(attention(window=(sys.maxsize, 0)), expected)
    assert torch.equal(attention(window=(10**30, 0)), expected)


def test_numbers_of_other_libraries_are_numbers():
    expected = attention(scale=0.5, causal=True)
    assert torch.equal(attention(scale=numpy.float32(0.5), causal=numpy.True_), expected)
    assert torch.equal(attention(scale=torch.tensor(0.5), causal=True), expected)
    with torch.no_grad():  # no gradient is wanted
        assert torch.equal(attention(scale=torch.tensor(0.5, requires_grad=True), causal=True), expected)


def stepped(p, **state):
    """An optimiser whose state for p is changed after a step; None removes a tensor."""
    optimizer = fastlm.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    for key, value in state.items():
        if value is None:
            del optimizer.state[p][key]
        else:
            optimizer.state[p][key] = value
    return optimizer


STATE = {
    "exp_avg_sq: expected a tensor in the state of every parameter, or no state at all, got none": {"exp_avg_sq": None},
    "step: expected a tensor in the state of every parameter, or no state at all, got none": {"step": None},
    "exp_avg: expected a tensor, got 0.5": {"exp_avg": 0.5},
    "exp_avg: expected shape (3, 4), as its parameter, got (4,)": {"exp_avg": torch.ones(4)},
}


@pytest.mark.parametrize("message, state", STATE.items())
def test_state_of_the_optimiser_that_does_not_fit_is_named(message, state):
    optimizer = stepped(torch.nn.Parameter(X.clone()), **state)
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        optimizer.step()


# Memory that does not hold a tensor's elements

SHORT = {
    "freed": values.freed,
    "freed view": values.freed_view,
    "one byte too few": lambda x: values.freed(x, x.nbytes - 1),
    "behind an offset": values.shortened_view,
    "strides that leave the storage": values.overlong,
}
STORAGE = (
    "expected a (tensor with storage, got one whose storage was freed|storage of at least [0-9]+ bytes, for its shape)"
)


def refuse_short_storages(backends=("torch", "reference")):
    """Every operator and the optimiser, by these backends and the selected one, with and without gradients."""
    backends = (None, *backends)
    for function in functions.OPERATORS:
        for argument, right in function.arguments().items():
            for what, short in SHORT.items():
                for backend in backends:
                    for gradient in (False, True):
                        arguments = function.arguments() | {argument: short(right)}
                        if gradient:
                            for name, x in arguments.items():  # PyTorch's attention gives masks no gradient
                                fixed = "mask" in name or name in function.tables
                                x.requires_grad_(x.is_floating_point() and not fixed)
                        with pytest.raises(ValueError, match=f"^{argument}: {STORAGE}"):
                            function.call(**arguments, backend=backend)
                            print(function.name, argument, what, backend)  # of the one that was accepted
        for argument, right in function.arguments().items():
            if right.is_floating_point():
                with (
                    torch.autocast("cpu", dtype=torch.bfloat16),
                    pytest.raises(ValueError, match=f"^{argument}: {STORAGE}"),
                ):
                    function.call(**function.arguments() | {argument: values.freed(right)})
    for backend in backends:
        for short in SHORT.values():
            for key in ("exp_avg", "exp_avg_sq", "step"):
                optimizer = stepped(torch.nn.Parameter(X.clone()))
                optimizer.backend = backend
                (state,) = optimizer.state.values()
                state[key] = short(state[key])
                with pytest.raises(ValueError, match=f"^{key}: {STORAGE}"):
                    optimizer.step()
            for key in ("parameter", "gradient"):
                optimizer = stepped(torch.nn.Parameter(X.clone()))
                optimizer.backend = backend
                (p,) = optimizer.param_groups[0]["params"]
                if key == "gradient":
                    p.grad = short(p.grad)
                elif short is not values.overlong:  # its strides are those of no parameter of the kernels
                    p.data = short(p.data)
                else:
                    continue
                with pytest.raises(ValueError, match=f"^{key}: {STORAGE}"):
                    optimizer.step()


@pytest.mark.skipif(not isa.kernels, reason=f"not compiled: {isa.missing}")
def test_without_a_compiled_module_storages_are_checked_alike():
    """Of tensors that fill their storage to its end, and of those for which it is short."""

    def message(check):
        try:
            check()
        except ValueError as error:
            return str(error)

    outcomes = []
    for base in (torch.arange(24.0).view(2, 3, 4), torch.ones(5), torch.ones(()), torch.ones(2, 0, 3)):
        views = [base, base.contiguous().transpose(0, -1) if base.dim() else base, base[1:] if base.dim() else base]
        for x in (*views, *(short(x.clone()) for x in views if x.numel() for short in SHORT.values())):
            python = message(lambda x=x: cpu.check_each_storage(("x", "none"), (x, None)))
            compiled = message(lambda x=x: isa.kernels.check_storage(("x", "none"), (x, None)))
            assert python == compiled, (x.shape, x.stride(), x.storage_offset())
            outcomes.append(python is None)
    assert 5 < sum(outcomes) < len(outcomes) - 20


def test_a_tensor_whose_memory_does_not_hold_its_elements_is_named():
    refuse_short_storages(("torch", "reference", *(("cpu",) if isa.kernels else ())))


@pytest.mark.skipif(not isa.kernels, reason=f"not compiled: {isa.missing}")
@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch does not have it")
def test_it_is_named_without_dlpacks_exchange_interface():
    """torch 2.9 does not have the interface."""
    code = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
from tests.core import test_errors
test_errors.refuse_short_storages(())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
