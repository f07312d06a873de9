"""The compiled functions take named arguments and check tensors: a wrong call is an error that names the argument."""

import os
import re
import subprocess
import sys

import pytest
import torch

from fastlm.backends import isa

pytestmark = pytest.mark.skipif(not isa.kernels, reason=f"not compiled: {isa.missing}")


def arguments(**changed):
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    y = torch.empty(3, 4)
    given = {"x": x, "weight": weight, "bias": None, "y": y, "conv1d": False, "threads": 1} | changed
    return {name: value for name, value in given.items() if value is not ...}


def linear(**changed):
    given = arguments(**changed)
    isa.kernels.linear_forward(**given)
    return given["y"]


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def test_keywords_come_in_any_order():
    given = arguments()
    isa.kernels.linear_forward(**dict(reversed(given.items())))
    torch.testing.assert_close(given["y"], given["x"] @ given["weight"].T)


WRONG_CALLS = [
    ({"weight": ...}, "linear_forward() missing keyword argument 'weight'"),
    ({"wieght": None}, "linear_forward() got an unexpected keyword argument 'wieght'"),
    ({"x": None}, "x: expected a tensor, got NoneType"),
    ({"x": [1.0]}, "x: expected a tensor, got list"),
    ({"conv1d": 1}, "conv1d: expected a bool, got int"),
    ({"threads": 1.5}, "threads: expected an integer, got float"),
]


@pytest.mark.parametrize("changed, message", WRONG_CALLS)
def test_a_wrong_keyword_or_type_is_a_type_error(changed, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        linear(**changed)


def test_positional_arguments_are_refused():
    with pytest.raises(TypeError, match=re.escape("linear_forward() takes keyword arguments only")):
        isa.kernels.linear_forward(*arguments().values())


WRONG_TENSORS = {
    "x: expected a dtype that the kernels know, got torch.float64": lambda: {"x": torch.randn(3, 5).double()},
    "x: expected torch.float32, torch.bfloat16 or torch.float16, got torch.int64": lambda: {
        "x": torch.ones(3, 5).long()
    },
    "weight: expected torch.float32, got torch.bfloat16": lambda: {"weight": torch.randn(4, 5).bfloat16()},
    "weight: expected 2 dimensions, got 1": lambda: {"weight": torch.randn(4)},
    "weight: expected 5 inputs and 4 outputs, got shape (4, 6)": lambda: {"weight": torch.randn(4, 6)},
    "weight: expected a stride of 1 in one of the dimensions": lambda: {"weight": torch.randn(8, 10)[::2, ::2]},
    "bias: expected a contiguous tensor of 4 elements, got shape (3,)": lambda: {"bias": torch.randn(3)},
    "x: expected rows with a contiguous last dimension, got shape (3, 5)": lambda: {"x": torch.randn(5, 3).t()},
    "x: expected a tensor on cpu, got one on meta": lambda: {"x": torch.randn(3, 5, device="meta")},
    "x: expected a tensor with storage, got one whose storage was freed": lambda: {"x": freed(torch.randn(3, 5))},
    "weight: expected a tensor with storage, got one whose": lambda: {"weight": freed(torch.randn(9, 5)[2:6])},
}


@pytest.mark.parametrize("message, changed", WRONG_TENSORS.items())
def test_a_tensor_that_the_kernel_cannot_take_is_a_value_error(message, changed):
    with pytest.raises(ValueError, match=re.escape(message)):
        linear(**changed())


def test_rows_are_contiguous_of_any_rank_or_strided_matrices():
    x, weight = torch.randn(2, 1, 3, 1, 2, 1, 1, 2, 1, 5), torch.randn(4, 5)  # more dimensions than strides are kept of
    y = torch.empty(*x.shape[:-1], 4)
    torch.testing.assert_close(linear(x=x, weight=weight, y=y), x @ weight.T)
    x = torch.randn(3, 9)[:, 2:7]
    torch.testing.assert_close(linear(x=x, weight=weight), x @ weight.T)
    wide = torch.nn.Parameter(torch.randn(5, 4))  # a subclass that requires a gradient
    torch.testing.assert_close(linear(x=x, weight=wide, conv1d=True), (x @ wide).detach())


def attention(**changed):
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    given = {"query": query, "key": key, "value": value, "out": torch.empty_like(query), "lse": torch.empty(2, 4, 3)}
    given |= {"mask": None, "key_padding": None, "query_starts": [], "key_starts": [], "scale": 1.0, "softcap": 0.0}
    given |= {"lower": -9, "upper": 9, "dropout_p": 0.0, "seed": 0, "threads": 1}
    isa.kernels.attention_forward(**given | changed)


WRONG_SHAPES = {
    "value: expected the shape of key, shape (2, 2, 5, 8)": lambda: {"value": torch.randn(2, 2, 4, 8)},
    "out: expected the shape of query, shape (2, 4, 3, 8)": lambda: {"out": torch.empty(2, 4, 3, 4)},
    "key: expected batch, heads and head_dim that fit query's": lambda: {"key": torch.randn(2, 3, 5, 8)},
    "query: expected 4 dimensions, got 3": lambda: {"query": torch.randn(4, 3, 8)},
    "lse: expected a contiguous tensor of 24 elements": lambda: {"lse": torch.empty(2, 4, 4)},
    "mask: expected torch.bool, torch.float32 or the dtype of query": lambda: {"mask": torch.ones(1, 1, 3, 5).half()},
    "key_padding: expected torch.bool, got torch.float32": lambda: {"key_padding": torch.ones(2, 5)},
}


@pytest.mark.parametrize("message, changed", WRONG_SHAPES.items())
def test_attention_names_the_argument_whose_shape_or_dtype_is_wrong(message, changed):
    changed = changed()
    if "key" in changed:
        changed["value"] = changed["key"]
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(**changed)


@pytest.mark.slow
def test_without_dlpacks_exchange_interface_tensors_are_read_through_their_attributes():
    """torch 2.9 does not have the interface."""
    code = f"""
import pytest
import torch

del torch.Tensor.__dlpack_c_exchange_api__
raise SystemExit(pytest.main(["-q", "-m", "not slow", {__file__!r}]))
"""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch does not have it either")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout
