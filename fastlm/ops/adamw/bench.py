"""Benchmark of AdamW: an update of the parameters of GPT-2 small, with gradient clipping as in fastlm.optim.AdamW."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.backends.selection import select
from fastlm.ops.adamw.spec import AdamWImplementation, Sizes, Update, operator
from fastlm.ops.benchmark import VOCAB, WIDTH, Benchmark, Case, Function, Problem, normal

MAX_NORM = 1.0
LAYER = (WIDTH, WIDTH, (WIDTH, 3 * WIDTH), 3 * WIDTH, (WIDTH, WIDTH), WIDTH)
MLP = (WIDTH, WIDTH, (WIDTH, 4 * WIDTH), 4 * WIDTH, (4 * WIDTH, WIDTH), WIDTH)
GPT2 = ((VOCAB, WIDTH), (1024, WIDTH), *(LAYER + MLP) * 12, WIDTH, WIDTH)


def update(parameters: list[Tensor]) -> Function:
    """fastlm's update; 16-bit parameters have float32 master weights."""
    dtype = parameters[0].dtype
    gradients = [p.grad for p in parameters if p.grad is not None]
    wide = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    masters = [] if dtype == torch.float32 else [p.detach().float() for p in parameters]
    steps = [torch.zeros(()) for _ in parameters]
    moments = wide, [torch.zeros_like(x) for x in wide]

    @torch.no_grad()
    def step(backend: str | None = None) -> None:
        implementation = select(operator, parameters[0], dtype, Sizes(False, False, False, False), backend)
        assert isinstance(implementation, AdamWImplementation)
        norm = math.sqrt(float(implementation.sum_of_squares(gradients)))
        implementation.forward(
            Update(
                parameters,
                gradients,
                *moments,
                masters,
                steps,
                max_exp_avg_sqs=[],
                lr=1e-3,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=1e-2,
                factor=min(1.0, MAX_NORM / (norm + 1e-6)),
                zero_gradients=False,
            )
        )

    return step


def eager(parameters: list[Tensor]) -> Function:
    """Fused AdamW after clip_grad_norm_. With 16-bit parameters it updates float32 copies of them."""
    if parameters[0].dtype == torch.float32:
        optimizer = torch.optim.AdamW(parameters, fused=True)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()

        return step
    masters = [p.detach().float().requires_grad_() for p in parameters]
    wide_gradients = [torch.empty_like(master) for master in masters]
    for master, gradient in zip(masters, wide_gradients, strict=True):
        master.grad = gradient
    gradients = [p.grad for p in parameters if p.grad is not None]
    optimizer = torch.optim.AdamW(masters, fused=True)

    @torch.no_grad()
    def step_of_masters() -> None:
        torch._foreach_copy_(wide_gradients, gradients)
        torch.nn.utils.clip_grad_norm_(masters, MAX_NORM)
        optimizer.step()
        torch._foreach_copy_(parameters, masters)

    return step_of_masters


def problem(dtype: torch.dtype, device: str = "cpu", *, shapes: Sequence[int | tuple[int, ...]] = GPT2) -> Problem:
    def parameters() -> list[Tensor]:
        made = []
        for shape in shapes:
            size = (shape,) if isinstance(shape, int) else shape
            p = normal(*size, dtype=dtype, device=device, scale=0.02).requires_grad_()
            p.grad = normal(*size, dtype=dtype, device=device, scale=1e-3)
            made.append(p)
        return made

    own, copies = parameters(), parameters()  # both are updated
    count = sum(p.numel() for p in own)
    return Problem(
        f"{count / 1e6:.3g} million parameters, clipped{'' if dtype == torch.float32 else ', with master weights'}",
        update(own),
        {"eager": eager(copies)},
        inputs=(),
        compiled={},
        extra_bytes=sum(p.nbytes for p in own),  # the norm reads the gradients
        random=True,  # every call continues from the last
    )


benchmark = Benchmark(cases=(Case("adamw", problem, directions=("step",), default=False),))
