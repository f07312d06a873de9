"""AdamW in one pass over memory.

The pass updates weights and moments and can also clip gradients, update master weights and set gradients to zero.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastlm.backends.cpu import check_storages
from fastlm.backends.selection import check_name, select
from fastlm.core.errors import (
    check_flag,
    check_floating,
    check_number,
    check_tensor,
    is_iterable,
    mismatch,
    wrong_type,
)
from fastlm.core.layout import is_dense, with_strides_of
from fastlm.core.tracing import PLAIN_TYPES, needs_custom_op
from fastlm.ops.adamw.spec import AdamWImplementation, Sizes, Update, operator
from fastlm.optim.checks import (
    MASTER,
    MOMENTS,
    STATE,
    check_group,
    check_is_state_dict,
    check_state_dict,
    missing_state,
)

HALVES = (torch.bfloat16, torch.float16)


@dataclasses.dataclass
class Batch:
    """Parameters of one group that one call updates: they share dtype, device and layout."""

    group: dict[str, Any]
    implementation: AdamWImplementation
    plain: bool  # no tensor subclasses, no dispatch mode
    parameters: list[Tensor] = dataclasses.field(default_factory=list)
    gradients: list[Tensor] = dataclasses.field(default_factory=list)
    states: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)

    def of(self, key: str) -> list[Tensor]:
        return [state[key] for state in self.states if key in state]

    def check(self) -> None:
        """State is the user's to load and change: what does not fit its parameter must not reach an implementation."""
        keys = ["exp_avg", "exp_avg_sq", "step"]
        keys += [MASTER] if any(MASTER in state for state in self.states) else []
        keys += ["max_exp_avg_sq"] if self.group["amsgrad"] else []
        names = "parameter", "gradient", *keys
        for p, gradient, state in zip(self.parameters, self.gradients, self.states, strict=True):
            tensors: tuple[Any, ...] = p, gradient, *[state.get(key) for key in keys]
            for name, x in zip(names, tensors, strict=True):
                check_tensor(name, x)
                if x.shape != (() if name == "step" else p.shape):
                    expected = "shape ()" if name == "step" else f"shape {tuple(p.shape)}, as its parameter"
                    raise mismatch(name, expected, tuple(x.shape))
            check_storages(names, tensors)

    def update(self, factor: float | Tensor, zero_gradients: bool, found_inf: Tensor | None) -> None:
        group = self.group
        if found_inf is not None and not self.implementation.takes_found_inf:
            if found_inf.item():
                self.skip(zero_gradients)
                return
            found_inf = None
        beta1, beta2 = group["betas"]
        self.implementation.forward(
            Update(
                self.parameters,
                self.gradients,
                exp_avgs=self.of("exp_avg"),
                exp_avg_sqs=self.of("exp_avg_sq"),
                masters=self.of(MASTER),
                steps=self.of("step"),
                max_exp_avg_sqs=self.of("max_exp_avg_sq") if group["amsgrad"] else [],
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                factor=-factor if group["maximize"] else factor,
                zero_gradients=zero_gradients,
                found_inf=found_inf,
            )
        )

    def skip(self, zero_gradients: bool) -> None:
        if zero_gradients:
            torch._foreach_zero_(self.gradients)


def without_compiler(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method as it is before torch._disable_dynamo wraps it, unless a graph is compiled.

    The first call of the wrapper imports PyTorch's compiler, which takes a second.
    """
    return method if torch.compiler.is_compiling() else inspect.unwrap(method)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101) whose step reads and writes everything once.

    Update, state and state dict are the same: either loads the other's. Learning-rate schedulers, GradScaler, closures
    and hooks work as usual. Sparse gradients are refused. PyTorch's own implementation updates what the kernels do not
    support: parameters on another device than a CPU, in float64 or a complex dtype, or not dense in memory, tensor
    subclasses such as DTensor, and groups with amsgrad.

    Args:
        params: as for every torch optimiser: tensors, (name, tensor) pairs or groups.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW; lr may be a tensor. Each can be set
            per group.
        max_grad_norm: clip the 2-norm of all gradients together to this, as torch.nn.utils.clip_grad_norm_ does, but
            without writing the gradients: they are read once more, and scaled during the update. None: no clipping. The
            norm before clipping is then in `grad_norm`, a 0-d tensor; the largest number clips nothing. Only
            gradients of this process count, unless there are sum_squares.
        master_weights: keep a float32 copy of every bfloat16 and float16 parameter, as state["master_param"], and
            float32 moments; the parameter is rounded from it in the same pass. Without it small updates are lost in 16
            bits. Elements of a parameter that were changed since the last step replace the master's.
        skip_nonfinite: with max_grad_norm, a step whose gradient norm is not finite changes neither parameters nor
            state, as a step that GradScaler skips. `grad_norm` tells; on a GPU nothing waits for it.
        zero_gradients: set gradients to zero in the same pass, instead of a zero_grad() after it; they are zeroed too
            when a step is skipped.
        sum_squares: with max_grad_norm, for parameters of which each process has a part: maps the sum of squares of
            the gradients of this process, a number or a 0-d tensor, to that of all processes.
        backend: force one (see fastlm.use_backend); None selects automatically.
        foreach, fused, capturable: accepted so that a call of torch.optim.AdamW need not change. They have no effect.

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
        skip_nonfinite: bool = False,
        sum_squares: Callable[[float | Tensor], float | Tensor] | None = None,
        backend: str | None = None,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if max_grad_norm is not None:
            expected = "a finite number above 0, or None"
            max_grad_norm = check_number("max_grad_norm", max_grad_norm, expected)
            if not max_grad_norm > 0:
                raise mismatch("max_grad_norm", expected, max_grad_norm)
        if backend is not None:
            check_name(backend)
        master_weights = check_flag("master_weights", master_weights)
        zero_gradients = check_flag("zero_gradients", zero_gradients)
        skip_nonfinite = check_flag("skip_nonfinite", skip_nonfinite)
        if skip_nonfinite and max_grad_norm is None:
            raise mismatch("skip_nonfinite", "False without max_grad_norm, which computes the norm", True)
        if sum_squares is not None:
            if not callable(sum_squares):
                raise wrong_type("sum_squares", "a function or None", sum_squares)
            if max_grad_norm is None:
                raise mismatch("sum_squares", "None without max_grad_norm, which computes the norm", "a function")
        check_flag("capturable", capturable)
        for name, flag in (("foreach", foreach), ("fused", fused)):
            if flag is not None:
                check_flag(name, flag)
        check_group({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        check_group({"amsgrad": amsgrad, "maximize": maximize})
        if isinstance(params, Tensor | str | dict) or not is_iterable(params):
            raise wrong_type("params", "tensors, (name, tensor) pairs or groups", params)
        listed: Any = list(params)
        if not listed:
            raise mismatch("params", "at least one tensor", "none")
        super().__init__(
            listed,
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
        self.max_grad_norm, self.master_weights = max_grad_norm, master_weights
        self.zero_gradients, self.skip_nonfinite, self.backend = zero_gradients, skip_nonfinite, backend
        self.sum_squares = sum_squares
        self.grad_norm: Tensor | None = None
        # GradScaler then passes grad_scale and found_inf instead of unscaling the gradients in a pass of its own.
        self._step_supports_amp_scaling = True

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "max_grad_norm",
            "master_weights",
            "zero_gradients",
            "skip_nonfinite",
            "sum_squares",
            "backend",
            "grad_norm",
            "_step_supports_amp_scaling",
        )
        # PyTorch's leaves out what is not its own, and a copy would then take other steps.
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.AdamW's."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise wrong_type("params", 'groups, which are dicts with the key "params"', param_group)
        check_group(param_group)
        without_compiler(torch.optim.AdamW.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.AdamW's."""
        without_compiler(torch.optim.AdamW.zero_grad)(self, set_to_none)

    @torch.no_grad()
    def begin(self) -> None:
        """Create the state that the first step would create; existing state is kept.

        Called before the first forward pass, it avoids fragmentation: in the first step the heap is full of gradients,
        and state allocated between them keeps later steps from reusing large blocks.
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
        """One update. closure: recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        without_compiler(AdamW._update)(self)
        return loss

    @torch._disable_dynamo  # a tracer cannot follow addresses: under torch.compile it runs between the graphs
    def _update(self) -> None:
        batches = list(self._batches())
        for batch in batches:
            if batch.plain:
                batch.check()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and found_inf.is_cpu:
            if found_inf.item():
                self._skip(batches, math.inf)
                return
            found_inf = None
        factor: float | Tensor = 1.0
        if scale is not None:
            factor = 1 / scale.item() if scale.is_cpu else 1 / scale
        if self.max_grad_norm is not None:
            factor = factor * self._clip_factor(batches, factor)
        if self.skip_nonfinite and self.grad_norm is not None and batches:
            if self.grad_norm.is_cpu:
                if not self.grad_norm.isfinite():
                    self._skip(batches, self.grad_norm.item())
                    return
            else:  # on the device, without synchronising
                not_finite = (~self.grad_norm.isfinite()).float()
                found_inf = not_finite if found_inf is None else torch.maximum(not_finite, found_inf)
        for batch in batches:
            batch.update(factor, self.zero_gradients, found_inf)

    def _skip(self, batches: list[Batch], norm: float) -> None:
        if self.max_grad_norm is not None:
            self.grad_norm = torch.tensor(norm, dtype=torch.float32, device="cpu")
        for batch in batches:
            batch.skip(self.zero_gradients)

    def _batches(self) -> Iterator[Batch]:
        """The parameters to update. Missing state is created, in the dtype and layout that an update takes."""
        traced = needs_custom_op()  # a dispatch mode must see PyTorch's operators
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
                        f"gradient {place}: expected a dense one, got layout {gradient.layout}; "
                        "torch.optim.SparseAdam takes sparse gradients"
                    )
                state = self.state[p]
                if "exp_avg" not in state or "exp_avg_sq" not in state or "step" not in state:
                    if any(name in state for name in STATE):  # this is not its first step
                        raise missing_state(next(name for name in STATE if name not in state))
                    self._begin(state, p)
                elif p.dtype in HALVES and (
                    self.master_weights != (MASTER in state)
                    or self.master_weights != (moment_dtype(state) == torch.float32)
                ):
                    self._convert(state, p)
                if amsgrad and "max_exp_avg_sq" not in state:
                    check_tensor("exp_avg_sq", state["exp_avg_sq"])
                    state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
                plain = not traced and type(p) in PLAIN_TYPES and type(gradient) in PLAIN_TYPES
                gaps = plain and not (p.is_contiguous() or is_dense(p))
                sizes = Sizes(amsgrad, gaps, gradient.dtype != p.dtype, not plain)
                key = (p.dtype, p.device, sizes)
                batch = batches.get(key)
                if batch is None:
                    implementation = select(operator, p, p.dtype, sizes, self.backend)
                    assert isinstance(implementation, AdamWImplementation)
                    batch = batches[key] = Batch(group, implementation, plain)
                batch.parameters.append(p)
                batch.gradients.append(gradient)
                batch.states.append(state)
            yield from batches.values()

    def _has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype in HALVES

    def _begin(self, state: dict[str, Tensor], p: Tensor) -> None:
        dtype = torch.float32 if self._has_master(p) else p.dtype
        state["step"] = torch.zeros((), dtype=torch.float32, device=step_device(p))
        for key in MOMENTS[:2]:
            state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        if self._has_master(p):
            state[MASTER] = p.detach().to(torch.float32)

    def _convert(self, state: dict[str, Tensor], p: Tensor) -> None:
        """Convert state that was created without master weights to state with them, or back."""
        dtype = torch.float32 if self._has_master(p) else p.dtype
        for key in MOMENTS:
            if key in state:
                state[key] = state[key].to(dtype)
        if self._has_master(p):
            state.setdefault(MASTER, p.detach().to(torch.float32))
        else:
            state.pop(MASTER, None)

    def _clip_factor(self, batches: list[Batch], factor: float | Tensor) -> float | Tensor:
        """The factor that clips the norm of all gradients to max_grad_norm, as clip_grad_norm_ computes it.

        factor: what the gradients are multiplied by already.
        """
        assert self.max_grad_norm is not None
        kinds: dict[tuple, tuple[AdamWImplementation, list[Tensor]]] = {}
        for batch in batches:
            first = batch.gradients[0]
            kind = batch.implementation, first.dtype, first.device
            kinds.setdefault(kind, (batch.implementation, []))[1].extend(batch.gradients)
        squares = [implementation.sum_of_squares(gradients) for implementation, gradients in kinds.values()]
        device = next((s.device for s in squares if isinstance(s, Tensor) and not s.is_cpu), None)
        if device is None:
            total = sum(float(s) for s in squares)
            if self.sum_squares is not None:
                total = float(self.sum_squares(total))
            norm = math.sqrt(total) * abs(float(factor))
            self.grad_norm = torch.tensor(norm, dtype=torch.float32, device="cpu")
            coefficient = self.max_grad_norm / (norm + 1e-6)
            return 1.0 if coefficient > 1 else coefficient  # NaN stays NaN: it must not pass for a small norm
        # On the device, without synchronising.
        on_device = [torch.as_tensor(s, dtype=torch.float32).to(device) for s in squares]
        sum_of_all = torch.stack(on_device).sum()
        if self.sum_squares is not None:
            sum_of_all = torch.as_tensor(self.sum_squares(sum_of_all), dtype=torch.float32, device=device)
        norms = sum_of_all.sqrt() * factor
        self.grad_norm = norms
        return (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for p in group["params"]:
                mine = self.state.get(p)
                if not mine:
                    continue
                if "step" not in mine:
                    raise missing_state("step")
                if not isinstance(mine["step"], Tensor):
                    raise wrong_type("step", "a tensor in the state of every parameter", mine["step"])
                if mine["step"].dtype != torch.float32:
                    mine["step"] = mine["step"].to(torch.float32)
                mine["step"] = mine["step"].to(step_device(p))  # it may have been saved on another device
                if type(p) in PLAIN_TYPES and p.is_cpu:
                    for key in (*MOMENTS, MASTER):
                        if key in mine:
                            mine[key] = with_strides_of(mine[key], p)

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.AdamW's, and from its state dicts too.

        With master_weights, float32 moments and master weights stay float32, where PyTorch casts all state to the dtype
        of its parameter. A state dict without master weights starts them from the parameters.

        Raises:
            ValueError: before anything is changed, if the state dict does not fit the parameters; it names the key.
        """
        check_is_state_dict(state_dict)
        seen: list[dict[str, Any]] = []

        def check(_: Any, final: dict[str, Any]) -> None:
            check_state_dict(self.param_groups, final)
            seen.append(final)

        # The last hook sees the state dict as the user's own hooks leave it.
        last = self.register_load_state_dict_pre_hook(check)
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
            state.pop(MASTER, None)  # PyTorch rounded it
            for key in (*MOMENTS, MASTER):
                if key in saved and (key != MASTER or saved[key].dtype == torch.float32):
                    value = saved[key].to(device=p.device, dtype=torch.float32)
                    state[key] = with_strides_of(value, p) if type(p) in PLAIN_TYPES else value


def moment_dtype(state: dict[str, Any]) -> torch.dtype:
    check_tensor("exp_avg", state["exp_avg"])
    check_floating("exp_avg", state["exp_avg"])
    return state["exp_avg"].dtype


def step_device(p: Tensor) -> torch.device:
    """The device of the step count: where PyTorch's fused implementation needs it, else the CPU, which reads it."""
    return p.device if p.device.type in ("cuda", "xpu") else torch.device("cpu")
