"""Random tensors and choices of one example: values, memory layouts, and what draws them."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support import DTYPES

# Values: each tensor is drawn from one of these


def normal(shape, generator):
    return torch.randn(shape, generator=generator)


def wide(shape, generator):
    """Magnitudes over many binary orders."""
    return normal(shape, generator) * torch.exp(3 * normal(shape, generator))


def outlier(shape, generator):
    x = normal(shape, generator)
    if x.numel():
        x.view(-1)[torch.randint(x.numel(), (), generator=generator)] = 300.0
    return x


def tiny(shape, generator):
    """Close to the smallest normal number of float16, and far below 1 in the others."""
    return normal(shape, generator) * 1e-4


def large(shape, generator):
    return normal(shape, generator) * 1e3


def equal(shape, generator):
    return torch.full(shape, normal((), generator).item())


def zeros(shape, generator):
    return torch.zeros(shape)


def integers(shape, generator):
    return torch.randint(-3, 4, shape, generator=generator).float()


VALUES = (normal, normal, wide, outlier, tiny, large, equal, zeros, integers)


# Layouts: how a tensor lies in memory


def strided(x: Tensor, layout: str) -> Tensor:
    """x with other strides; the values are the same, except that a broadcast dimension repeats its first entry."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "gaps" and x.dim():
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "offset":
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
    if layout == "rows" and x.dim() > 1:
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if layout == "broadcast" and x.dim() > 1:
        return x[:1].expand(x.shape)
    return x


LAYOUTS = ("contiguous", "contiguous", "transposed", "gaps", "offset", "rows", "broadcast")


class Draw:
    """Tensors and choices of one example."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        seed = data.draw(st.integers(0, 2**32), label="seed")
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # of near_1()
        self.dtype = self.one_of(DTYPES, "dtype")

    def one_of(self, choices: Any, label: str) -> Any:
        return self.data.draw(st.sampled_from(choices), label=label)

    def size(self, largest: int, label: str, smallest: int = 1) -> int:
        return self.data.draw(st.integers(smallest, largest), label=label)

    def tensor(self, *shape: int, label: str, values: Any = VALUES) -> Tensor:
        """Finite in the example's dtype."""
        largest = torch.finfo(self.dtype).max
        made = self.one_of(values, f"values of {label}")(shape, self.generator).clamp(-largest, largest)
        return strided(made.to(self.dtype), self.one_of(LAYOUTS, f"layout of {label}"))

    def maybe(self, *shape: int, label: str) -> Tensor | None:
        return self.tensor(*shape, label=label) if self.data.draw(st.booleans(), label=label) else None

    def permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self.generator)
