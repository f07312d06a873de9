"""The arguments of the CUDA launchers are checked before a launch.

The tests use the emulated module, which is compiled from the same bindings as the real one.
"""

import pytest
import torch

from tests.support import EMULATED

pytestmark = pytest.mark.skipif(not EMULATED, reason="needs FASTLM_CUDA_EMULATION=1")


@pytest.fixture
def kernels():
    from fastlm.backends import cuda

    return cuda.kernels


def layernorm(**changed):
    x, weight, row = torch.randn(3, 16), torch.ones(16), torch.empty(3)
    arguments = {"x": x, "residual": None, "weight": weight, "bias": None, "y": torch.empty(3, 16), "summed": None}
    arguments |= {"mean": row, "rstd": row.clone(), "seed": None, "eps": 1e-5, "dropout_p": 0.0}
    return arguments | {"device": 0, "stream": 0} | changed


def attention(**changed):
    q, k, lse = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.empty(2, 4, 5)
    arguments = {"query": q, "key": k, "value": k.clone(), "out": torch.empty_like(q), "lse": lse, "mask": None}
    arguments |= {"key_padding": None, "query_starts": None, "key_starts": None, "seed": None, "scale": 1.0}
    arguments |= {"softcap": 0.0, "lower": -100, "upper": 100, "dropout_p": 0.0, "tf32": False}
    return arguments | {"device": 0, "stream": 0} | changed


def test_any_order_of_keywords(kernels):
    expected, arguments = layernorm(), layernorm()
    arguments["x"] = expected["x"]
    kernels.layernorm_residual_forward(**expected)
    kernels.layernorm_residual_forward(**dict(reversed(arguments.items())))
    assert torch.equal(arguments["y"], expected["y"])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.zeros(3, 16, dtype=torch.float64)}, "x: expected a dtype .*, got torch.float64"),
        ({"x": torch.zeros(3, 16, dtype=torch.int64)}, "x: expected .*torch.bfloat16 or .*, got torch.int64"),
        ({"weight": torch.ones(15)}, r"weight: expected a contiguous tensor of 16 elements, got shape \(15,\)"),
        ({"y": torch.empty(3, 16, dtype=torch.bfloat16)}, "y: expected torch.float32, got torch.bfloat16"),
        ({"mean": torch.empty(4)}, "mean: expected a contiguous tensor of 3 elements"),
        ({"x": torch.randn(3, 32)[:, ::2]}, "x: expected rows with a contiguous last dimension"),
        ({"residual": torch.randn(2, 16)}, "residual: expected 3 rows of 16"),
    ],
)
def test_layernorm_residual(changed, message, kernels):
    with pytest.raises(ValueError, match=message):
        kernels.layernorm_residual_forward(**layernorm(**changed))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"value": torch.randn(2, 2, 6, 8)}, r"value: expected shape \(2, 2, 7, 8\), got shape \(2, 2, 6, 8\)"),
        ({"key": torch.randn(2, 2, 7, 8).half()}, "key: expected torch.float32, got torch.float16"),
        ({"out": torch.empty(2, 4, 8, 5).mT}, "out: expected a contiguous last dimension"),
        ({"query": torch.randn(4, 5, 8)}, "query: expected 4 dimensions, got 3"),
        ({"mask": torch.zeros(5, 7)}, "mask: expected 4 dimensions, got 2"),
        ({"mask": torch.zeros(1, 1, 5, 7).half()}, "mask: expected torch.bool, torch.float32 or the dtype of query"),
        ({"key_padding": torch.ones(2, 7)}, "key_padding: expected torch.bool, got torch.float32"),
        ({"query_starts": torch.tensor([0, 5])}, "key_starts: expected 2 offsets, got 0"),
    ],
)
def test_attention(changed, message, kernels):
    with pytest.raises(ValueError, match=message):
        kernels.attention_forward(**attention(**changed))


def test_names(kernels):
    with pytest.raises(TypeError, match=r"layernorm_residual_forward\(\) missing keyword argument 'eps'"):
        kernels.layernorm_residual_forward(**{name: x for name, x in layernorm().items() if name != "eps"})
    with pytest.raises(TypeError, match=r"layernorm_residual_forward\(\) got an unexpected keyword argument 'epsilon'"):
        kernels.layernorm_residual_forward(**layernorm(), epsilon=1)
    with pytest.raises(TypeError, match=r"x: expected a tensor, got list"):
        kernels.layernorm_residual_forward(**layernorm(x=[1.0]))
