"""Projections with a low-rank adapter of PEFT: y = x Wᵀ + b + s · (x Aᵀ) Bᵀ.

PEFT's own arithmetic writes the product with B, multiplies it by s and adds it: six passes over a tensor as large as y,
and two more for the gradient. Here the product with B accumulates into y, and s scales the narrow x Aᵀ and its gradient.
"""

import sys
from typing import Any

import torch
from torch import Tensor

import fastlm
from fastlm.core.autocast import autocast_enabled
from fastlm.integrations.parts import projection_reason
from fastlm.integrations.patch import Patch, is_compiling, observed_reason


class LowRankUpdate(torch.autograd.Function):
    """y += scale · (x aᵀ) bᵀ, in place. y: (…, out), contiguous; x: (…, in); a: (rank, in); b: (out, rank)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        narrow = torch.mm(x.reshape(-1, x.shape[-1]), a.t())
        y.view(-1, y.shape[-1]).addmm_(narrow, b.t(), alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, a, b, narrow)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, narrow = ctx.saved_tensors
        rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():  # create_graph=True: narrow depends on x and a
            narrow = torch.mm(x_rows, a.t())
        _, needs_dx, needs_da, needs_db, _ = ctx.needs_input_grad
        dnarrow = torch.mm(rows, b) * ctx.scale
        return (
            dy,
            torch.mm(dnarrow, a).view(x.shape) if needs_dx else None,
            torch.mm(dnarrow.t(), x_rows) if needs_da else None,
            torch.mm(rows.t(), narrow) * ctx.scale if needs_db else None,
            None,
        )


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
        base = self.module.base_layer
        y = fastlm.linear(x, base.weight, base.bias, layout=self.layout)
        if y._is_view():  # of a product that autograd knows: it would copy what is written in place
            y = y.clone()
        return LowRankUpdate.apply(y, dropout(x), a, b, scale)

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
