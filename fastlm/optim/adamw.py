"""AdamW in one pass over memory: decay, moments, update, and, where asked for, clipping, master weights and zeroing of gradients."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastlm.backends import choose
from fastlm.backends.layout import laid_out_like, without_gaps
from fastlm.ops.boundary import PLAIN, mismatch, opaque

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
MASTER = "master_param"
HALVES = (torch.bfloat16, torch.float16)


@dataclasses.dataclass
class Batch:
    """Parameters of one group that one call of a backend updates: they have dtype, device and layout in common."""

    group: dict[str, Any]
    backend: ModuleType
    parameters: list[Tensor] = dataclasses.field(default_factory=list)
    gradients: list[Tensor] = dataclasses.field(default_factory=list)
    states: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)

    def of(self, key: str) -> list[Tensor]:
        return [state[key] for state in self.states if key in state]

    def update(self, factor: float | Tensor, zero_gradients: bool) -> None:
        group = self.group
        beta1, beta2 = group["betas"]
        self.backend.adamw(
            self.parameters,
            self.gradients,
            self.of("exp_avg"),
            self.of("exp_avg_sq"),
            self.of(MASTER),
            self.of("step"),
            max_exp_avg_sqs=self.of("max_exp_avg_sq") if group["amsgrad"] else [],
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            factor=-factor if group["maximize"] else factor,
            zero_gradients=zero_gradients,
        )


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101) with a step that reads and writes everything once.

    The same update, state and state dict: one's can be loaded into the other. Learning-rate schedulers, GradScaler, closures and hooks work as usual. Sparse
    gradients are refused. What the kernels cannot serve goes to PyTorch's own implementation: parameters on another device than a CPU, in float64 or a complex
    type, with gaps in memory, tensor subclasses such as DTensor, and groups with amsgrad.

    Args:
        params: as every torch optimiser takes them: tensors, (name, tensor) pairs or groups.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW; lr may be a tensor. Each can be set per group.
        max_grad_norm: clip the 2-norm of all gradients together to this, as torch.nn.utils.clip_grad_norm_ does, but without writing the gradients: they are
            read once more and scaled while the update uses them. None: no clipping. The norm before clipping is then in `grad_norm`, a 0-d tensor. Only
            gradients of this process count: where parameters are sharded without DTensor, clip as the sharding library says.
        master_weights: keep a float32 copy of every bfloat16 and float16 parameter, as state["master_param"], and float32 moments; the parameter is written
            from it in the same pass. Without it small updates are lost in 16 bits. Where a parameter was changed by others since the last step, the change
            holds: its elements replace the master's.
        zero_gradients: set gradients to zero in the same pass, instead of a zero_grad() after it; they are zeroed too when GradScaler skips a step.
        backend: forces one (see fastlm.use_backend); None: the first that can.
        foreach, fused, capturable: accepted so that a call for torch.optim.AdamW need not change. They change nothing.

    Raises:
        ValueError: an argument out of its range.
        RuntimeError: from step(), before anything is changed, if a gradient is sparse.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        zero_gradients: bool = False,
        backend: str | None = None,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise mismatch("max_grad_norm", "a number above 0, or None", max_grad_norm)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
        self.max_grad_norm, self.master_weights, self.zero_gradients, self.backend = (
            max_grad_norm,
            master_weights,
            zero_gradients,
            backend,
        )
        self.grad_norm: Tensor | None = None
        self._step_supports_amp_scaling = (
            True  # GradScaler then gives grad_scale and found_inf instead of a pass over the gradients
        )

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "max_grad_norm",
            "master_weights",
            "zero_gradients",
            "backend",
            "grad_norm",
            "_step_supports_amp_scaling",
        )
        return super().__getstate__() | {
            name: getattr(self, name) for name in own
        }  # PyTorch's forgets what is not its own, and a copy would step otherwise

    @torch.no_grad()
    def begin(self) -> None:
        """Create the state now that the first step would create; state that is there already is left alone.

        Before the first forward pass memory is empty. In the first step it is full of gradients and of holes between them: what is put there to stay keeps
        later steps from finding room in one piece.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and "exp_avg" not in self.state[p]:
                    self._begin(self.state[p], p)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. closure: computes the loss anew; its result is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch._disable_dynamo  # addresses are not for a tracer: under torch.compile it runs between the graphs
    def _update(self) -> None:
        batches = list(self._batches())
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and found_inf.item():
            if self.zero_gradients:
                for batch in batches:
                    torch._foreach_zero_(batch.gradients)
            return
        factor: float | Tensor = 1.0 if scale is None else 1 / scale.item()
        if self.max_grad_norm is not None:
            factor = factor * self._clipping(batches, factor)
        for batch in batches:
            batch.update(factor, self.zero_gradients)

    def _batches(self) -> Iterator[Batch]:
        """What there is to update. State that is missing is created, and brought into the type and layout that an update takes."""
        watched = opaque()  # a dispatch mode must see the operators
        for number, group in enumerate(self.param_groups):
            batches: dict[tuple, Batch] = {}
            amsgrad = group["amsgrad"]
            for index, p in enumerate(group["params"]):
                gradient = p.grad
                if gradient is None:
                    continue
                if gradient.layout != torch.strided:
                    place = f"of parameter {index} in group {number}"
                    raise RuntimeError(
                        f"gradient {place}: expected a dense one, got layout {gradient.layout}; torch.optim.SparseAdam takes sparse gradients"
                    )
                state = self.state[p]
                if not state or "exp_avg" not in state:
                    self._begin(state, p)
                elif p.dtype in HALVES and (
                    self.master_weights != (MASTER in state)
                    or self.master_weights != (state["exp_avg"].dtype == torch.float32)
                ):
                    self._convert(state, p)
                if amsgrad and "max_exp_avg_sq" not in state:
                    state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
                plain = not watched and type(p) in PLAIN and type(gradient) in PLAIN
                gaps = plain and not (p.is_contiguous() or without_gaps(p))
                key = (p.dtype, p.device, plain, gaps, gradient.dtype != p.dtype)
                batch = batches.get(key)
                if batch is None:
                    backend = choose(
                        "adamw", p, p.dtype, self.backend, amsgrad, gaps, gradient.dtype != p.dtype, not plain
                    )
                    batch = batches[key] = Batch(group, backend)
                batch.parameters.append(p)
                batch.gradients.append(gradient)
                batch.states.append(state)
            yield from batches.values()

    def _has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype in HALVES

    def _begin(self, state: dict[str, Tensor], p: Tensor) -> None:
        dtype = torch.float32 if self._has_master(p) else p.dtype
        state["step"] = torch.zeros((), dtype=torch.float32, device=home_of_step(p))
        for key in MOMENTS[:2]:
            state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        if self._has_master(p):
            state[MASTER] = p.detach().to(torch.float32)

    def _convert(self, state: dict[str, Tensor], p: Tensor) -> None:
        """From a state that was made without master weights to one with them, or back."""
        dtype = torch.float32 if self._has_master(p) else p.dtype
        for key in MOMENTS:
            if key in state:
                state[key] = state[key].to(dtype)
        if self._has_master(p):
            state.setdefault(MASTER, p.detach().to(torch.float32))
        else:
            state.pop(MASTER, None)

    def _clipping(self, batches: list[Batch], factor: float | Tensor) -> float | Tensor:
        """What the gradients are multiplied with so that their norm is at most max_grad_norm, by the formula of clip_grad_norm_."""
        assert self.max_grad_norm is not None
        kinds: dict[tuple, tuple[ModuleType, list[Tensor]]] = {}
        for batch in batches:
            first = batch.gradients[0]
            kinds.setdefault((batch.backend, first.dtype, first.device), (batch.backend, []))[1].extend(batch.gradients)
        squares = [backend.sum_of_squares(gradients) for backend, gradients in kinds.values()]
        elsewhere = next((s.device for s in squares if isinstance(s, Tensor) and not s.is_cpu), None)
        if elsewhere is None:
            norm = math.sqrt(sum(float(s) for s in squares)) * abs(float(factor))
            self.grad_norm = torch.tensor(norm, dtype=torch.float32, device="cpu")
            coefficient = self.max_grad_norm / (norm + 1e-6)
            return (
                1.0 if coefficient > 1 else coefficient
            )  # NaN stays: a gradient that is NaN must not pass for a small one
        norms = (
            torch.stack([torch.as_tensor(s, dtype=torch.float32).to(elsewhere) for s in squares]).sum().sqrt() * factor
        )  # nobody waits for another device
        self.grad_norm = norms
        return (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for p in group["params"]:
                mine = self.state.get(p)
                if not mine:
                    continue
                if mine["step"].dtype != torch.float32:
                    mine["step"] = mine["step"].to(torch.float32)
                mine["step"] = mine["step"].to(home_of_step(p))  # it may have been saved on another
                if type(p) in PLAIN and p.is_cpu:
                    for key in (*MOMENTS, MASTER):
                        if key in mine:
                            mine[key] = laid_out_like(mine[key], p)

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.AdamW's, and from its state dicts too; float32 moments and master weights stay float32 where master_weights asks for them.

        PyTorch casts all state to the type of its parameter. A state dict without master weights starts them from the parameters.
        """
        seen: list[dict[str, Any]] = []
        last = self.register_load_state_dict_pre_hook(
            lambda _, final: seen.append(final)
        )  # as the user's own hooks leave it
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        if not self.master_weights:
            return
        ids = [i for group in seen[0]["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, parameters, strict=True):
            saved = seen[0]["state"].get(i)
            if not saved or not self._has_master(p):
                continue
            state = self.state[p]
            state.pop(MASTER, None)  # rounded by PyTorch
            for key in (*MOMENTS, MASTER):
                if key in saved and (key != MASTER or saved[key].dtype == torch.float32):
                    value = saved[key].to(device=p.device, dtype=torch.float32)
                    state[key] = laid_out_like(value, p) if type(p) in PLAIN else value


def home_of_step(p: Tensor) -> torch.device:
    """Where the count of steps is kept: where PyTorch's fused implementation wants it, else on the CPU, where reading it costs nothing."""
    return p.device if p.device.type in ("cuda", "xpu") else torch.device("cpu")
