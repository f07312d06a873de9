"""One case of the test matrix."""

import dataclasses
from collections.abc import Callable

import torch

from tests.support import floats

ALL_BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
WITHOUT_TORCH = ("reference", "cpu", "triton", "cuda")


@dataclasses.dataclass(frozen=True)
class Case:
    operator: str
    name: str
    call: Callable  # (backend) → a function of the inputs
    inputs: Callable  # (dtype) → floating-point tensors
    backends: tuple[str, ...] = ALL_BACKENDS  # those that support it, if they are available
    dropout: bool = False
    fixed: bool = False  # uses tensors of its own, on the CPU, that fit these sizes only: targets, padding, boundaries
    smallest: Callable | None = None  # (float64 input) → a smaller one, for gradcheck
    rounds_weights: bool = False  # under autocast its weights are rounded to the autocast dtype
    wide_result: bool = False  # under autocast the result stays in float32
    not_cast: tuple[int, ...] = ()  # inputs that autocast leaves as they are
    vendor_gemm: bool = False  # on a GPU it launches no kernel of ours

    def leaves(self, dtype=torch.float32):
        return [x.requires_grad_() for x in self.inputs(dtype)]


def normal_inputs(*shapes):
    """Normal numbers; matrices are scaled so that their products have a variance of about 1 too."""

    def inputs(dtype):
        scales = [shape[-1] ** 0.5 if len(shape) == 2 else 1 for shape in shapes]
        pairs = enumerate(zip(shapes, scales, strict=True))
        return [(floats(*shape, i + 1)[..., 0] / scale).to(dtype).contiguous() for i, (shape, scale) in pairs]

    return inputs
