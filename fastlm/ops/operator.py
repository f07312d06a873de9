"""Everything about an operator that follows from the descriptions of its calls.

An eager call runs straight on the selected backend. Under torch.compile, export, fake tensors, a dispatch mode or for a
tensor subclass it is one torch.library operator, whose schema, fake results and FLOP formula come from the call. An
autograd.Function is used only when a gradient is wanted; it is outside the torch.library operator, which was measured
to cost less than register_autograd.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, get_args, get_type_hints

import torch
from torch import Tensor

from fastlm.backends.contract import Implementation, Results
from fastlm.backends.cpu import check_storages
from fastlm.backends.registry import Registered
from fastlm.backends.selection import refuse_transforms, requested, select
from fastlm.core.imports import after_import
from fastlm.core.tracing import distinct, needs_custom_op, none_to_empty

# How a field of a call stands in a torch.library schema.
SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    tuple[bool, ...]: "bool[]",
}


class Operator(Registered):
    """One operator. A subclass in its package's autograd.py names its calls and says how it is differentiated.

    Class attributes:
        Forward: the forward call; its first `inputs` fields are the tensors that can get a gradient, in the order in
            which backward returns them. Besides the Call protocol it has results_present(), which results exist.
        Backward: the backward call: the gradients of the outputs, the saved tensors, attributes, and last `needed`, a
            bool for each input. An operator with fp32_grads has that field before `needed`. None: the operator brings
            an autograd.Function of its own.
        results: how many results the forward has.
        outputs: how many of them the caller gets. The others are for the backward.
        inputs: how many inputs can get a gradient.
    """

    Forward: ClassVar[Any]
    Backward: ClassVar[Any] = None
    Sizes: ClassVar[type]
    results: ClassVar[int]
    outputs: ClassVar[int] = 1
    inputs: ClassVar[int]

    def __init__(self, name: str, package: str) -> None:
        super().__init__(name, package, self.Sizes)
        self.fields = len(self.Forward._fields)
        self.tensors = num_tensors(self.Forward)
        self.tensor_names = self.Forward._fields[: self.tensors]
        self.forward_op = define(f"fastlm::{name}_forward", self, self.Forward, self.results, lambda i: i.forward)
        if self.Backward is not None:
            self.backward_op = define(
                f"fastlm::{name}_backward", self, self.Backward, self.inputs, lambda i: i.backward
            )
            self.function = make_function(self)
            # Without what Function.apply does in Python for torch.func transforms, which select() refuses.
            self.apply = super(torch.autograd.Function, self.function).apply  # type: ignore[misc]

    # What an operator says itself

    def save(self, call: Any, results: Any) -> tuple[Sequence[Tensor | None], tuple]:
        """(saved tensors, attributes) of the Backward call, between the upstream gradients and fp32_grads."""
        raise NotImplementedError

    def formula(self, call: Any) -> tuple[Callable[..., Any], Sequence[Tensor | None]]:
        """For double backward: (a differentiable function of the inputs, the inputs), of a Backward call."""
        raise NotImplementedError

    def without_saving(self, call: Any) -> Any:
        """The forward call where there is no backward to save anything for."""
        return call

    def differentiable_gradients(self, call: Any, originals: Sequence[Tensor | None]) -> Results:
        """Gradients that can themselves be differentiated (create_graph=True), by the reference formula.

        originals: the float32 weights that autocast rounded, or (); the formula then starts from them.
        """
        function, inputs = self.formula(call)
        if originals:
            inputs, function = (inputs[0], *originals), rounding(function, inputs[0].dtype)  # type: ignore[union-attr]
        return tuple(gradients_of(function, inputs, call.needed, call[: self.outputs]))

    # What follows from that

    def draw_seed(self, x: Tensor, dropout_p: float) -> Tensor | None:
        """A 0-d int64 seed from the default generator of x's device; None without dropout.

        Consecutive calls differ, torch.manual_seed repeats them, and activation checkpointing replays them.
        """
        if dropout_p == 0:
            return None
        if not torch.compiler.is_compiling():
            refuse_transforms(self)
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=x.device)

    def __call__(self, call: Any, backend: str | None, originals: tuple[Tensor | None, ...] = ()) -> Any:
        """The first `outputs` results of a forward call; one of them bare, several as a tuple.

        originals: the float32 weights, if autocast rounded them for this call.
        """
        tensors = call[: self.tensors]
        selected: Implementation[Any, Any] | str | None
        if needs_custom_op(*tensors):
            selected = requested(backend)
            if torch.compiler.is_compiling():
                call = self.Forward(*distinct(*tensors), *call[self.tensors :])
        else:  # once: the backward uses the same
            x, dtype, sizes = call.subject()
            selected = select(self, x, dtype, sizes, backend)
            check_storages(self.tensor_names, tensors)
            if selected.composite is not None and not originals:
                composed = selected.composite(call)
                if composed is not NotImplemented:
                    return composed
        if torch.is_grad_enabled():
            for tensor in (*tensors[: self.inputs], *originals):
                if tensor is not None and tensor.requires_grad:
                    apply = self.apply if isinstance(selected, Implementation) else self.function.apply
                    return apply(*call, selected, *originals)
        results = self.forward(self.without_saving(call), selected)
        return results[0] if self.outputs == 1 else results[: self.outputs]

    def forward(self, call: Any, selected: Implementation[Any, Any] | str | None) -> Results:
        if isinstance(selected, Implementation):
            return selected.forward(call)
        results = self.forward_op(*without_fp32_grads(call), selected)
        results = (results,) if isinstance(results, Tensor) else results
        return tuple([result if there else None for result, there in zip(results, call.results_present(), strict=True)])

    def backward(self, call: Any, selected: Implementation[Any, Any] | str | None) -> Results:
        """The gradients of the inputs."""
        # The saved tensors were checked in the forward pass.
        if isinstance(selected, Implementation) and not needs_custom_op(*call[: self.outputs]):
            assert selected.backward is not None
            return selected.backward(call)
        name = selected.backend.name if isinstance(selected, Implementation) else selected
        gradients = self.backward_op(*without_fp32_grads(call), name)
        gradients = (gradients,) if isinstance(gradients, Tensor) else gradients
        return tuple([gradient if need else None for gradient, need in zip(gradients, call.needed, strict=True)])


def check_memory(names: tuple[str, ...], *tensors: Tensor | None) -> None:
    """For a function that copies its arguments before it calls the operator, which checks what it gets."""
    # Under a torch.func transform, which operators refuse, tensors have no memory.
    if not needs_custom_op(*tensors) and torch._C._functorch.peek_interpreter_stack() is None:
        check_storages(names, tensors)


def without_fp32_grads(call: Any) -> Any:
    """A torch.library operator returns gradients in the weights' dtype, and autograd converts them."""
    return call._replace(fp32_grads=False) if "fp32_grads" in call._fields else call


@functools.cache
def num_tensors(call: type) -> int:
    """How many fields of a call are tensors; they come first."""
    kinds = list(get_type_hints(call).values())
    return sum(kind is Tensor or Tensor in get_args(kind) for kind in kinds)


def schema_of(call: type, num_results: int) -> str:
    fields = ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(call).items())
    results = ", ".join(["Tensor"] * num_results)
    return f"({fields}, str? backend) -> {results if num_results == 1 else f'({results})'}"


def define(
    name: str, operator: Operator, call: Any, num_results: int, function_of: Callable[[Any], Any]
) -> Callable[..., Any]:
    """The torch.library operator of a call."""

    def as_tensors(like: Tensor, results: Results) -> Any:
        tensors = none_to_empty(like, tuple(results))
        return tensors[0] if len(tensors) == 1 else tensors

    def run(*arguments: Any) -> Any:
        *fields, backend = arguments
        made = call(*fields)
        x, dtype, sizes = made.subject()
        results = function_of(select(operator, x, dtype, sizes, backend))(made)
        # A torch.library operator must not return one of its inputs.
        owned = [r.clone() if r is not None and any(r is field for field in fields) else r for r in results]
        return as_tensors(x, tuple(owned))

    def fake(*arguments: Any) -> Any:
        made = call(*arguments[:-1])
        return as_tensors(made.subject()[0], made.empty_results())

    def flops(*arguments: Any, **_: Any) -> int:
        return call(*arguments[:-1]).flops()

    defined = torch.library.custom_op(name, run, mutates_args=(), schema=schema_of(call, num_results))
    defined.register_fake(fake)
    packet = getattr(torch.ops.fastlm, name.removeprefix("fastlm::"))

    def register_flops() -> None:
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(packet, get_raw=True)(flops)

    after_import("torch.utils.flop_counter", register_flops)  # it imports Triton, which takes a tenth of a second
    return packet


# Operators by name: torch.compile of PyTorch 2.9 finds a global in an autograd.Function, but no object of its closure.
differentiable: dict[str, Operator] = {}


def make_function(operator: Operator) -> type[torch.autograd.Function]:
    """The autograd.Function of an operator: apply(*forward call, selected backend, *original float32 weights)."""
    name, fields, inputs, outputs = operator.name, operator.fields, operator.inputs, operator.outputs
    Forward, Backward = operator.Forward, operator.Backward
    has_fp32_grads = "fp32_grads" in Backward._fields
    differentiable[name] = operator

    def forward(ctx: Any, *arguments: Any) -> Any:
        operator = differentiable[name]
        ctx.set_materialize_grads(False)
        call, selected = Forward(*arguments[:fields]), arguments[fields]
        results = operator.forward(call, selected)
        tensors, ctx.attributes = operator.save(call, results)
        ctx.save_for_backward(*tensors)
        ctx.backend, ctx.originals = selected, arguments[fields + 1 :]
        return results[0] if outputs == 1 else results[:outputs]

    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        operator, originals = differentiable[name], ctx.originals
        none: tuple[None, ...] = (None,) * (fields + 1 - inputs)
        if upstream[0] is None and upstream[-1] is None:  # there are one or two outputs
            return (None,) * (fields + 1 + len(originals))
        needed = ctx.needs_input_grad[:inputs]
        if originals:
            needed = needed[0], *ctx.needs_input_grad[fields + 1 :]
        fp32_grads = (bool(originals),) if has_fp32_grads else ()
        call = Backward(*upstream, *ctx.saved_tensors, *ctx.attributes, *fp32_grads, needed)
        if torch.is_grad_enabled():
            gradients = operator.differentiable_gradients(call, originals)
        else:
            gradients = operator.backward(call, ctx.backend)
        if originals:
            return gradients[0], *(None,) * (inputs - 1), *none, *gradients[1:]
        return *gradients, *none

    # The class is made by type(), so that the graph shows the operator's name.
    title = "".join(part.capitalize() for part in operator.name.split("_"))
    return type(
        title, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


def rounding(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """A function of rounded weights as one of the float32 weights, which it rounds."""
    return lambda x, *weights: function(x, *(w if w is None else w.to(dtype) for w in weights))


def gradients_of(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    upstream: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of function(*inputs) that are part of the graph; None where not needed, or where nothing depends on it.

    The function runs on aliases of the inputs: where one input was computed from another, the path between them belongs
    to the caller's graph and must not be counted here as well.
    """
    with torch.enable_grad():
        aliases = [x if x is None else x.view_as(x) for x in inputs]
        wanted = [alias for alias, need in zip(aliases, needed, strict=True) if need and alias is not None]
        results = function(*aliases)
        results = (results,) if isinstance(results, Tensor) else results
        pairs = [(r, g) for r, g in zip(results, upstream, strict=True) if g is not None]
        outputs, grads = [r for r, _ in pairs], [g for _, g in pairs]
        gradients = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(gradients) if need else None for need in needed]
