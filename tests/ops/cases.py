"""Each operator once, small, with everything that makes it work: for the promises that are the same for all of them."""

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch

import fastlm
from tests.support import BACKENDS, floats, targets


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    call: Callable  # (backend) → a function of the inputs
    inputs: Callable  # (dtype) → floating-point tensors
    backends: tuple[str, ...] = ("reference", "torch", "cpu", "triton", "cuda")
    fixed: bool = False  # brings tensors of its own, on the CPU, that fit these sizes only: targets, padding, where sequences start

    def leaves(self, dtype=torch.float32):
        return [x.requires_grad_() for x in self.inputs(dtype)]


def made_of(*shapes):
    """Normal numbers, matrices scaled so that their products are about 1 too."""
    return lambda dtype: [
        (floats(*shape, i + 1)[..., 0] / (shape[-1] ** 0.5 if len(shape) == 2 else 1)).to(dtype).contiguous()
        for i, shape in enumerate(shapes)
    ]


TARGETS = targets(40, 2, 9, ignored=[4])
PADDING = torch.arange(9) < torch.tensor([[9], [6]])
QKV = ((2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16))
PACKED = ((18, 4, 16), (18, 2, 16), (18, 2, 16))
STARTS, KEY_STARTS = torch.tensor([0, 9, 10, 10, 18]), torch.tensor([0, 7, 8, 11, 18])
OURS = ("reference", "cpu", "triton", "cuda")

CASES = [
    Case("linear", lambda b: lambda x, w, c: fastlm.linear(x, w, c, backend=b), made_of((2, 9, 24), (20, 24), (20,))),
    Case(
        "linear conv1d",
        lambda b: lambda x, w, c: fastlm.linear(x, w, c, layout="conv1d", backend=b),
        made_of((2, 9, 24), (24, 20), (20,)),
    ),
    *(
        Case(
            f"gelu_mlp recompute {level}",
            lambda b, level=level: (
                lambda *t: fastlm.gelu_mlp(*t, approximate="tanh" if level else "none", recompute=level, backend=b)
            ),
            made_of((2, 9, 24), (48, 24), (48,), (20, 48), (20,)),
        )
        for level in (0, 1, 2)
    ),
    Case(
        "layernorm_residual",
        lambda b: lambda *t: fastlm.layernorm_residual(*t, backend=b),
        made_of((2, 9, 24), (2, 9, 24), (24,), (24,)),
    ),
    Case(
        "layernorm",
        lambda b: lambda x, w, c: fastlm.layernorm_residual(x, None, w, c, backend=b)[0],
        made_of((2, 9, 24), (24,), (24,)),
    ),
    Case(
        "layernorm_residual dropout",
        lambda b: lambda *t: fastlm.layernorm_residual(*t, dropout_p=0.3, backend=b),
        made_of((2, 9, 24), (2, 9, 24), (24,), (24,)),
        OURS,
    ),
    *(
        Case(
            f"linear_cross_entropy {reduction}",
            lambda b, r=reduction: (
                lambda x, w, c: fastlm.linear_cross_entropy(
                    x, w, TARGETS, c, reduction=r, label_smoothing=0.1, backend=b
                )
            ),
            made_of((2, 9, 24), (40, 24), (40,)),
            fixed=True,
        )
        for reduction in ("mean", "none")
    ),
    Case("attention", lambda b: lambda q, k, v: fastlm.attention(q, k, v, backend=b), made_of(*QKV)),
    Case(
        "attention masked",
        lambda b: (
            lambda q, k, v: fastlm.attention(q, k, v, causal=True, key_padding=PADDING, window=(5, None), backend=b)
        ),
        made_of(*QKV),
        fixed=True,
    ),
    Case(
        "attention all",
        lambda b: (
            lambda q, k, v, m: fastlm.attention(q, k, v, causal=True, mask=m, dropout_p=0.2, return_lse=True, backend=b)
        ),
        made_of(*QKV, (1, 4, 9, 9)),
        OURS,
    ),
    Case(
        "packed attention",
        lambda b: lambda q, k, v: fastlm.attention_varlen(q, k, v, STARTS, STARTS, causal=True, backend=b),
        made_of(*PACKED),
        fixed=True,
    ),
    Case(
        "packed attention all",
        lambda b: (
            lambda q, k, v: fastlm.attention_varlen(
                q, k, v, STARTS, KEY_STARTS, window=(3, 2), dropout_p=0.2, return_lse=True, backend=b
            )
        ),
        made_of(*PACKED),
        OURS,
        fixed=True,
    ),
    Case(
        "sdpa",
        lambda b: (
            lambda q, k, v: fastlm.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, backend=b)
        ),
        made_of(*QKV),
    ),
]


def on_every_case(test=None, *, backends=("reference", "torch", "cpu"), dropout=True):
    """Every operator on every backend of this run that serves it, or on some; `dropout` says whether the cases with dropout take part.

    Of what is the same for all backends, as it happens before one is chosen, Triton under its interpreter need not be asked.
    """
    if test is None:
        return functools.partial(on_every_case, backends=backends, dropout=dropout)
    cases = [case for case in CASES if dropout or case.backends != OURS]
    pairs = [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in cases
        for name in BACKENDS
        if name in case.backends and name in backends
    ]
    return pytest.mark.parametrize("case, backend", pairs)(test)
