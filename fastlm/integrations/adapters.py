"""Projections with a low-rank adapter of PEFT: y = x Wᵀ + b + s · (x Aᵀ) Bᵀ.

PEFT's own arithmetic writes the product with B, multiplies it by s and adds it: six passes over a tensor as large as y,
two for its gradient, and four for that of x. Here the product with B accumulates into y, and the product with A into
the gradient of x: two passes each. s scales the gradient of the narrow x Aᵀ.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from fastlm.core.autocast import autocast_enabled
from fastlm.integrations.parts import projection_reason
from fastlm.integrations.patch import Patch, is_compiling, observed_reason
from fastlm.ops.linear import linear


class Narrow(torch.autograd.Function):
    """(x, x aᵀ). x: (…, in); a: (rank, in). The first result is for the product with the weight.

    Its gradient has no other reader, so the gradient through a accumulates into it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a)
        return x.view_as(x), torch.mm(x.reshape(-1, x.shape[-1]), a.t())

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dnarrow: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        x, a = ctx.saved_tensors
        needs_dx, needs_da = ctx.needs_input_grad
        if dnarrow is None:
            return dx, None
        da = torch.mm(dnarrow.t(), x.reshape(-1, x.shape[-1])) if needs_da else None
        if not needs_dx:
            return None, da
        if dx is None:
            return torch.mm(dnarrow, a).view(x.shape), da
        rows = dx.reshape(-1, x.shape[-1])
        rows = torch.addmm(rows, dnarrow, a) if torch.is_grad_enabled() else rows.addmm_(dnarrow, a)
        return rows.view(x.shape), da


class Widened(torch.autograd.Function):
    """y += scale · narrow bᵀ, in place. y: (…, out), contiguous; narrow: (rows, rank); b: (out, rank)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, narrow: Tensor, b: Tensor, scale: float) -> Tensor:
        y.view(-1, y.shape[-1]).addmm_(narrow, b.t(), alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(narrow, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        narrow, b = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dnarrow = torch.mm(rows, b) * ctx.scale if ctx.needs_input_grad[1] else None
        db = torch.mm(rows.t(), narrow) * ctx.scale if ctx.needs_input_grad[2] else None
        return dy, dnarrow, db, None


def is_adapter(module: Any) -> bool:
    """Whether a module is PEFT's linear layer with low-rank adapters."""
    peft = sys.modules.get("peft.tuners.lora.layer")
    return peft is not None and type(module) is peft.Linear


class AdapterPatch(Patch):
    """The forward of a projection with an adapter, where one plain adapter is active."""

    def __init__(self, adapter: Any, layout: str, options: dict[str, bool]) -> None:
        super().__init__(adapter, options)
        self.layout = layout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        adapter = None if kwargs or len(args) != 1 or observed_reason(args[0]) else self.plain_adapter(args[0])
        if adapter is None:
            return self.original(*args, **kwargs)
        (x,), (a, b, dropout, scale) = args, adapter
        base, dropped = self.module.base_layer, dropout(x)
        same, narrow = Narrow.apply(dropped, a)
        if dropped is x and x.requires_grad:
            x = same
        y = linear(x, base.weight, base.bias, layout=self.layout)
        if y._is_view():  # of a product that autograd knows: it would copy what is written in place
            y = y.clone()
        return Widened.apply(y, narrow, b, scale)

    def plain_adapter(self, x: Tensor) -> tuple[Tensor, Tensor, Any, float] | None:
        """(a, b, dropout, scale) of the only active adapter; None where PEFT computes something else."""
        module = self.module
        if is_compiling() or autocast_enabled(x) or module.disable_adapters or module.merged:
            return None
        active = [name for name in module.active_adapters if name in module.lora_A]
        if len(active) != 1 or active[0] in getattr(module, "lora_variant", active):
            return None
        base, a, b = module.base_layer, module.lora_A[active[0]], module.lora_B[active[0]]
        if projection_reason(base, self.layout) or any(projection_reason(each, "linear") for each in (a, b)):
            return None
        if a.bias is not None or b.bias is not None:
            return None
        if not x.dtype == base.weight.dtype == a.weight.dtype == b.weight.dtype:
            return None
        scale = module.scaling[active[0]]
        return (a.weight, b.weight, module.lora_dropout[active[0]], scale) if type(scale) is float else None
