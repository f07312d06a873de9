"""The activations of feed-forward blocks in plain PyTorch, with their derivatives."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Activation(NamedTuple):
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def silu_slope(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid + x * sigmoid * (1 - sigmoid)


def gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def gelu_tanh_slope(x: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    t = torch.tanh(inner)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


ACTIVATIONS = {
    "silu": Activation(F.silu, silu_slope),
    "gelu": Activation(F.gelu, gelu_slope),
    "gelu_tanh": Activation(lambda x: F.gelu(x, approximate="tanh"), gelu_tanh_slope),
    "relu": Activation(F.relu, lambda x: (x > 0).to(x.dtype)),
}
NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}  # as compiled code takes them (csrc/activation.h)
