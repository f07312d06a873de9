"""The parts of a layer, and for each the reason why it must be called as a module and no operator may replace it."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from transformers import activations
from transformers.pytorch_utils import Conv1D

import fastlm
from fastlm.integrations.families import Family, parent
from fastlm.integrations.patch import call_reason
from fastlm.models.layers import RECOMPUTE

# The last two take a parameter's place while a graph is traced.
PLAIN_TENSORS = frozenset((nn.Parameter, Tensor, FakeTensor, FunctionalTensor))
PROJECTIONS = {
    "linear": (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear),
    "conv1d": (Conv1D,),
}
# `approximate` of gelu_mlp by the class of an activation of transformers. Versions differ in which of them they have.
GELUS = {
    getattr(activations, name): approximate
    for approximate, names in {
        "none": ("GELUActivation",),
        "tanh": (
            "NewGELUActivation",
            "GELUTanh",
            "PytorchGELUTanh",
            "FastGELUActivation",
            "AccurateGELUActivation",
        ),
    }.items()
    for name in names
    if hasattr(activations, name)
}
POSITIONS = {"learned": "absolute"}  # as the attention modules of transformers 4 call them
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
Parameter = nn.Parameter

# Classes of containers whose forward is defined in the family's module, so that it computes what the family describes,
# and the parameters of each one's forward. They are read in eager mode only: torch.compile cannot trace `inspect`.
container_parameters: dict[type, tuple[str, ...]] = {}


# Operators by the kinds of families.py. A norm is given by its module's `__dict__`, projections by their `_parameters`.


def layer_norm(norm: dict, x: Tensor, residual: Tensor | None, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    own = norm["_parameters"]
    return fastlm.layernorm_residual(x, residual, own["weight"], own["bias"], norm["eps"], dropout_p=dropout_p)


def plain_mlp(x: Tensor, up: dict, down: dict, approximate: str, layout: str) -> Tensor:
    return fastlm.gelu_mlp(
        x,
        up["weight"],
        up["bias"],
        down["weight"],
        down["bias"],
        approximate=approximate,
        layout=layout,
        recompute=RECOMPUTE,
    )


class Kind(NamedTuple):
    operator: str
    run: Callable


NORM_CLASSES = {"layer": nn.LayerNorm}
NORMS = {"layer": Kind("layernorm_residual", layer_norm)}
MLPS = {"plain": Kind("gelu_mlp", plain_mlp)}


# Reasons: "" if an operator may replace the module


def projection_reason(module: Any, layout: str) -> str:
    if type(module) not in PROJECTIONS[layout]:
        return f"is a {type(module).__name__}"
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(weight) not in PLAIN_TENSORS or (bias is not None and type(bias) not in PLAIN_TENSORS):
        return f"has a weight of type {type(weight).__name__}"
    return call_reason(module)


def norm_reason(module: Any, kind: str) -> str:
    if type(module) is not NORM_CLASSES[kind]:
        return f"is a {type(module).__name__}"
    if type(module._parameters.get("weight")) not in PLAIN_TENSORS:
        return "has no plain weight"
    if len(module.normalized_shape) != 1:
        return f"normalises over {module.normalized_shape}"
    return call_reason(module)


def dropout_reason(module: Any) -> str:
    if type(module) is not nn.Dropout:
        return f"is a {type(module).__name__}"
    return "has a probability of 1" if module.p >= 1 else call_reason(module)


def container_reason(module: Any) -> str:
    """Why a container must be called with all its parts."""
    if type(module) not in container_parameters:
        return f"is a {type(module).__name__}"
    return call_reason(module)


def attention_reason(module: Any, positions: str) -> str:
    kind = getattr(module, "position_embedding_type", POSITIONS[positions])
    return f"has {kind} positions" if kind != POSITIONS[positions] else container_reason(module)


def gelu_of(activation: Any) -> str | None:
    """`approximate` of gelu_mlp; None if the activation is no GELU or must be called."""
    if not isinstance(activation, nn.Module) or call_reason(activation):
        return None
    return activation.approximate if type(activation) is nn.GELU else GELUS.get(type(activation))


def register_containers(layer: Any, family: Family) -> None:
    """A class is registered if its forward is defined in the family's module."""
    for path in containers(family):
        kind = type(layer.get_submodule(path))
        if kind not in container_parameters:
            if getattr(inspect.unwrap(kind.forward), "__module__", "") == family.module:
                container_parameters[kind] = parameter_names(kind)


def containers(family: Family) -> set[str]:
    paths = {family.attention, parent(family.attention), parent(family.out), parent(family.up), parent(family.down)}
    return paths - {""}


def parameter_names(kind: Any) -> tuple[str, ...]:
    """The parameters of a class's forward; "**" for arbitrary keyword arguments."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple("**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters)


class Parts:
    """The modules of a layer and the reason for each.

    Valid until a module is replaced or a reason appears or disappears.
    """

    def __init__(self, layer: Any, family: Family) -> None:
        self.links: list[tuple[dict, str, Any]] = []  # (parent's _modules, name, module)
        self.layer = layer
        self.find_modules(family)
        self.find_reasons(family)
        self.remember_state()

    def find_modules(self, family: Family) -> None:
        self.attention = self.find(family.attention)
        block = parent(family.attention)
        self.attention_block: Any = self.find(block) if block else None  # it adds the residual and normalizes, too
        self.out_owner, self.up_owner = self.find(parent(family.out)), self.find(parent(family.up))
        self.down_owner = self.find(parent(family.down))
        self.attention_norm, self.mlp_norm = self.find(family.attention_norm), self.find(family.mlp_norm)
        self.qkv = [self.find(path) for path in family.qkv]
        self.attention_dropout = self.find(family.attention_dropout)
        self.out, self.up, self.down = self.find(family.out), self.find(family.up), self.find(family.down)
        self.out_dropout: Any = self.find(family.out_dropout) if family.out_dropout else None
        self.mlp_dropout: Any = self.find(family.mlp_dropout) if family.mlp_dropout else None
        self.activation = getattr(self.up_owner, family.activation.rpartition(".")[2])  # a module or a function
        if isinstance(self.activation, nn.Module):
            self.find(family.activation)

        self.pre_norm = family.norm_place == "pre"
        self.middle_norm = self.mlp_norm if self.pre_norm else self.attention_norm  # after the attention's residual
        self.layout, self.num_heads = family.layout, family.num_heads
        self.run_norm, self.run_mlp = NORMS[family.norm].run, MLPS[family.mlp].run
        own = self.attention.__dict__
        self.causal = next((name for name in family.causal if name in own), None)

    def find_reasons(self, family: Family) -> None:
        block, out_owner = self.attention_block, self.out_owner
        self.attention_reason = attention_reason(self.attention, family.positions)
        self.block_reason = "" if block is None else container_reason(block)
        self.out_owner_reason = self.attention_reason if out_owner is self.attention else container_reason(out_owner)
        self.up_owner_reason, self.down_owner_reason = (
            container_reason(self.up_owner),
            container_reason(self.down_owner),
        )
        self.gelu: Any = gelu_of(self.activation)

        projections, norms = (*self.qkv, self.out, self.up, self.down), (self.attention_norm, self.mlp_norm)
        dropouts = [module for module in (self.out_dropout, self.mlp_dropout) if module is not None]
        self.reasons = {module: projection_reason(module, family.layout) for module in projections}
        self.reasons |= {module: norm_reason(module, family.norm) for module in norms}
        self.reasons |= {module: dropout_reason(module) for module in dropouts}
        owner_reasons = (self.attention_reason, self.out_owner_reason, self.up_owner_reason, self.down_owner_reason)
        self.all_replaceable = self.gelu is not None and not any(
            (self.block_reason, *owner_reasons, *self.reasons.values())
        )
        self.parameters = [module._parameters for module in (*projections, *norms)]

    def remember_state(self) -> None:
        """What `is_current` compares at every call, as whole lists, and what the fused layer reads.

        Attributes are read from `__dict__`: an attribute lookup on a module goes through nn.Module's `__getattr__` slot
        and costs several times as much.
        """
        self.modules = list(dict.fromkeys(module for _, _, module in self.links))
        self.classes = [type(module) for module in self.modules]
        self.dicts = [module.__dict__ for module in self.modules]
        self.parents = list({id(siblings): siblings for siblings, _, _ in self.links}.values())
        self.children = [dict(siblings) for siblings in self.parents]
        self.hooks = [own[kind] for own in self.dicts for kind in HOOKS]

        self.qkv_parameters = [module._parameters for module in self.qkv]
        self.out_parameters, self.up_parameters = self.out._parameters, self.up._parameters
        self.down_parameters = self.down._parameters
        self.layer_dict, self.attention_dict = self.layer.__dict__, self.attention.__dict__
        self.attention_norm_dict, self.mlp_norm_dict = self.attention_norm.__dict__, self.mlp_norm.__dict__
        self.middle_norm_dict = self.middle_norm.__dict__
        none: dict[str, Any] = {"training": False, "p": 0.0}
        self.out_dropout_dict = none if self.out_dropout is None else self.out_dropout.__dict__
        self.mlp_dropout_dict = none if self.mlp_dropout is None else self.mlp_dropout.__dict__

    def find(self, path: str) -> Any:
        module = self.layer
        for name in path.split("."):
            siblings = module._modules
            module = siblings[name]
            self.links.append((siblings, name, module))
        return module

    def is_current(self, weights: bool = True) -> bool:
        """Whether every part could be replaced and still can: no module replaced, hooked or wrapped since.

        This is what a layer pays at every call for allowing such changes. weights=False ignores the weights: while a
        layer is not running, sharding replaces them by other kinds of tensors.
        """
        if not self.all_replaceable or self.parents != self.children or [*map(type, self.modules)] != self.classes:
            return False
        check_each = is_dynamo_compiling() or any(self.hooks)  # hooks may be idle
        if not check_each:
            for own in self.dicts:
                if "forward" in own:
                    check_each = True
        if check_each:
            for module in self.modules:
                if call_reason(module):
                    return False
        if weights:
            for own in self.parameters:
                kind = type(own.get("weight"))
                if kind is not Parameter and kind not in PLAIN_TENSORS:
                    return False
        return True
