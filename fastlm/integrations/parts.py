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

from fastlm.integrations.families import Family, parent
from fastlm.integrations.patch import call_reason
from fastlm.models.layers import RECOMPUTE
from fastlm.ops.gelu_mlp import gelu_mlp
from fastlm.ops.glu_mlp import glu_mlp
from fastlm.ops.layernorm_residual import layernorm_residual
from fastlm.ops.rms_norm_residual import rms_norm_residual

# The last two take a parameter's place while a graph is traced.
PLAIN_TENSORS = frozenset((nn.Parameter, Tensor, FakeTensor, FunctionalTensor))
PROJECTIONS = {
    "linear": (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear),
    "conv1d": (Conv1D,),
}
ACTIVATION_NAMES = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
}
# `activation` of glu_mlp by the class. Versions of transformers differ in which of them they have.
ACTIVATIONS = {getattr(activations, name): own for name, own in ACTIVATION_NAMES.items() if hasattr(activations, name)}
ACTIVATIONS |= {nn.SiLU: "silu", nn.ReLU: "relu"}
# The first as the attention modules of transformers 4 call it.
POSITIONS = {"learned": "absolute", "rotary": "rotary", "relative": "relative"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
Parameter = nn.Parameter


class Container(NamedTuple):
    """Of a class whose forward is defined in a family's module, so that it computes what the family describes."""

    home: str  # that module
    parameters: tuple[str, ...]  # of the forward


# By class. They are read in eager mode only: torch.compile cannot trace `inspect`.
containers: dict[type, Container] = {}


# Operators by the kinds of families.py. A norm is given by its module's `__dict__`, projections by their `_parameters`.


def layer_norm(norm: dict, x: Tensor, residual: Tensor | None, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    own = norm["_parameters"]
    return layernorm_residual(x, residual, own["weight"], own["bias"], norm["eps"], dropout_p=dropout_p)


def rms_norm(norm: dict, x: Tensor, residual: Tensor | None, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    weight = norm["_parameters"]["weight"]
    return rms_norm_residual(x, residual, weight, norm["variance_epsilon"], dropout_p=dropout_p)


def rms_norm_offset(norm: dict, x: Tensor, residual: Tensor | None, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    weight = norm["_parameters"]["weight"]
    return rms_norm_residual(x, residual, weight, norm["eps"], unit_offset=True, dropout_p=dropout_p)


def plain_mlp(x: Tensor, gate: None, up: dict, down: dict, approximate: str, layout: str) -> Tensor:
    return gelu_mlp(
        x,
        up["weight"],
        up["bias"],
        down["weight"],
        down["bias"],
        approximate=approximate,
        layout=layout,
        recompute=RECOMPUTE,
    )


def gated_mlp(x: Tensor, gate: dict, up: dict, down: dict, activation: str, layout: str) -> Tensor:
    return glu_mlp(
        x,
        gate["weight"],
        up["weight"],
        down["weight"],
        gate["bias"],
        up["bias"],
        down["bias"],
        activation=activation,
        recompute=RECOMPUTE,
    )


def fused_gated_mlp(x: Tensor, gate: None, up: dict, down: dict, activation: str, layout: str) -> Tensor:
    (gate_weight, up_weight), bias = up["weight"].chunk(2), up["bias"]
    gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
    return glu_mlp(
        x,
        gate_weight,
        up_weight,
        down["weight"],
        gate_bias,
        up_bias,
        down["bias"],
        activation=activation,
        recompute=RECOMPUTE,
    )


class Norm(NamedTuple):
    operator: str
    run: Callable


class MLP(NamedTuple):
    operator: str
    run: Callable
    activations: dict[str, str]  # the operator's argument by activation
    expected: str  # these activations in words


NORMS = {
    "layer": Norm("layernorm_residual", layer_norm),
    "rms": Norm("rms_norm_residual", rms_norm),
    "rms_offset": Norm("rms_norm_residual", rms_norm_offset),
}
GATED_ACTIVATIONS = {name: name for name in ("silu", "gelu", "gelu_tanh", "relu")}, "a plain SiLU, GELU or ReLU"
MLPS = {
    "plain": MLP("gelu_mlp", plain_mlp, {"gelu": "none", "gelu_tanh": "tanh"}, "a plain GELU"),
    "gated": MLP("glu_mlp", gated_mlp, *GATED_ACTIVATIONS),
    "fused_gated": MLP("glu_mlp", fused_gated_mlp, *GATED_ACTIVATIONS),
}


# Reasons: "" if an operator may replace the module
IS_A = "is a "  # begins a reason that depends on the class alone


def projection_reason(module: Any, layout: str) -> str:
    if type(module) not in PROJECTIONS[layout]:
        return f"{IS_A}{type(module).__name__}"
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(weight) not in PLAIN_TENSORS or (bias is not None and type(bias) not in PLAIN_TENSORS):
        return f"has a weight of type {type(weight).__name__}"
    return call_reason(module)


def norm_reason(module: Any, family: Family) -> str:
    kind, name = type(module), family.norm_class
    if not (kind is nn.LayerNorm if name is None else family.has_norm(kind)):
        return f"{IS_A}{kind.__name__}"
    if type(module._parameters.get("weight")) not in PLAIN_TENSORS:
        return "has no plain weight"
    if name is None and len(module.normalized_shape) != 1:
        return f"normalises over {module.normalized_shape}"
    return call_reason(module)


def dropout_reason(module: Any) -> str:
    if type(module) is nn.Identity:  # where a model without dropout has one
        return call_reason(module)
    if type(module) is not nn.Dropout:
        return f"{IS_A}{type(module).__name__}"
    return "has a probability of 1" if module.p >= 1 else call_reason(module)


def container_reason(module: Any, family: Family) -> str:
    """Why a container must be called with all its parts."""
    container = containers.get(type(module))
    if container is None or container.home != family.module:
        return f"{IS_A}{type(module).__name__}"
    return call_reason(module)


def attention_reason(module: Any, family: Family) -> str:
    kind = getattr(module, "position_embedding_type", POSITIONS[family.positions])
    if kind != POSITIONS[family.positions]:
        return f"has {kind} positions"
    return container_reason(module, family)


def activation_name(activation: Any) -> str | None:
    """None if the activation is not in ACTIVATIONS or must be called."""
    if not isinstance(activation, nn.Module) or call_reason(activation):
        return None
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return ACTIVATIONS.get(type(activation))


def register_container(kind: Any, family: Family) -> None:
    """Registers a class if its forward is defined in the family's module."""
    if kind not in containers and getattr(inspect.unwrap(kind.forward), "__module__", "") == family.module:
        containers[kind] = Container(family.module, parameter_names(kind))


def parameter_names(kind: Any) -> tuple[str, ...]:
    """The parameters of a class's forward; "**" for arbitrary keyword arguments."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple("**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters)


def dict_of(module: Any) -> dict | None:
    return None if module is None else module.__dict__


def dropout_dict(module: Any) -> dict:
    return module.__dict__ if type(module) is nn.Dropout else {"training": False, "p": 0.0}


class Parts:
    """The modules of a layer and the reason for each.

    Valid until a module is replaced or a reason appears or disappears.
    """

    def __init__(self, layer: Any, family: Family) -> None:
        self.links: list[tuple[dict, str, Any]] = []  # (parent's _modules, name, module)
        self.layer = layer
        self.find_modules(family)
        if not torch.compiler.is_compiling():
            for module in (self.attention_block, self.attention, self.out_owner, self.up_owner, self.down_owner):
                if module is not None:
                    register_container(type(module), family)
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
        self.query_norm, self.key_norm = self.find_optional(family.query_norm), self.find_optional(family.key_norm)
        name = family.attention_dropout.rpartition(".")[2]
        if name in self.attention._modules:
            self.attention_dropout: tuple[dict, str] = self.find(family.attention_dropout).__dict__, "p"
        else:
            self.attention_dropout = self.attribute(name)
        self.out, self.up, self.down = self.find(family.out), self.find(family.up), self.find(family.down)
        self.gate = self.find_optional(family.gate)
        self.out_dropout, self.mlp_dropout = (
            self.find_optional(family.out_dropout),
            self.find_optional(family.mlp_dropout),
        )
        # Whether these modules drop their own output.
        self.attention_has_dropout = parent(family.out_dropout or family.out) == parent(family.out)
        self.mlp_has_dropout = parent(family.mlp_dropout or family.down) == parent(family.down)
        self.attention_output_norm = self.find_optional(family.attention_output_norm)
        self.hidden_dropout = self.find_optional(family.hidden_dropout)
        self.mlp_output_norm = self.find_optional(family.mlp_output_norm)
        self.activation = getattr(self.up_owner, family.activation.rpartition(".")[2])  # a module or a function
        if isinstance(self.activation, nn.Module):
            self.find(family.activation)

        self.pre_norm = family.norm_place == "pre"
        self.no_attention_norm = self.pre_norm and type(self.attention_norm) is nn.Identity
        self.middle_norm = self.mlp_norm if self.pre_norm else self.attention_norm  # after the attention's residual
        self.layout, self.num_heads, self.head_dim = family.layout, family.num_heads, family.head_dim
        self.run_norm, self.run_mlp = NORMS[family.norm].run, MLPS[family.mlp].run
        self.is_gate_fused = family.mlp == "fused_gated"
        own = self.attention.__dict__
        self.causal = next((name for name in family.causal if name in own), None)
        self.is_rotary, self.rotates = family.positions == "rotary", family.rotates
        self.is_relative = family.positions == "relative"
        windows = [self.attribute(name) for name in family.window]
        self.window = next((window for window in windows if window[1] in window[0]), None)
        self.softcap = family.softcap

    def find_reasons(self, family: Family) -> None:
        block, out_owner = self.attention_block, self.out_owner
        projections = [module for module in (*self.qkv, self.out, self.gate, self.up, self.down) if module is not None]
        attention_norm = None if self.no_attention_norm else self.attention_norm
        block_norms = (attention_norm, self.mlp_norm, self.attention_output_norm, self.mlp_output_norm)
        head_norms = [module for module in (self.query_norm, self.key_norm) if module is not None]
        norms = [module for module in block_norms if module is not None] + head_norms
        dropouts = [
            module for module in (self.out_dropout, self.hidden_dropout, self.mlp_dropout) if module is not None
        ]
        self.reasons = {module: projection_reason(module, family.layout) for module in projections}
        self.reasons |= {module: norm_reason(module, family) for module in norms}
        self.reasons |= {module: dropout_reason(module) for module in dropouts}
        if self.no_attention_norm:
            self.reasons[self.attention_norm] = call_reason(self.attention_norm)

        self.attention_reason = attention_reason(self.attention, family)
        for module in head_norms:  # families differ in the layout of what these norms get
            self.attention_reason = self.attention_reason or self.reasons[module]
        self.block_reason = "" if block is None else container_reason(block, family)
        self.out_owner_reason = (
            self.attention_reason if out_owner is self.attention else container_reason(out_owner, family)
        )
        self.up_owner_reason = container_reason(self.up_owner, family)
        self.down_owner_reason = container_reason(self.down_owner, family)
        # The MLP operator's argument for the activation; None if it has none.
        self.activation_name = MLPS[family.mlp].activations.get(activation_name(self.activation) or "")

        owner_reasons = (self.attention_reason, self.out_owner_reason, self.up_owner_reason, self.down_owner_reason)
        reasons = [reason for reason in (self.block_reason, *owner_reasons, *self.reasons.values()) if reason]
        self.all_replaceable = self.activation_name is not None and not reasons
        # Then they stay as long as the classes do.
        self.reasons_are_classes = all(reason.startswith(IS_A) for reason in reasons) and (
            isinstance(self.activation, nn.Module) and not call_reason(self.activation)
        )
        self.parameters = [module._parameters for module in (*projections, *norms) if not self.reasons[module]]

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
        self.gate_parameters = None if self.gate is None else self.gate._parameters
        self.layer_dict, self.attention_dict = self.layer.__dict__, self.attention.__dict__
        has_input_norm = self.pre_norm and not self.no_attention_norm
        self.input_norm_dict = self.attention_norm.__dict__ if has_input_norm else None
        self.mlp_norm_dict = self.mlp_norm.__dict__
        self.middle_norm_dict = self.middle_norm.__dict__
        self.query_norm_dict, self.key_norm_dict = dict_of(self.query_norm), dict_of(self.key_norm)
        self.attention_output_norm_dict = dict_of(self.attention_output_norm)
        self.mlp_output_norm_dict = dict_of(self.mlp_output_norm)
        self.out_dropout_dict, self.mlp_dropout_dict = dropout_dict(self.out_dropout), dropout_dict(self.mlp_dropout)
        self.hidden_dropout_dict = dropout_dict(self.hidden_dropout)

    def find(self, path: str) -> Any:
        module = self.layer
        for name in path.split("."):
            siblings = module._modules
            module = siblings[name]
            self.links.append((siblings, name, module))
        return module

    def find_optional(self, path: str | None) -> Any:
        return None if path is None else self.find(path)

    def attribute(self, name: str) -> tuple[dict, str]:
        """A `__dict__` and the key of an attribute of the attention module or its configuration in it."""
        owner, _, name = name.rpartition(".")
        return (getattr(self.attention, owner) if owner else self.attention).__dict__, name

    def is_current(self, weights: bool = True) -> bool:
        """Whether the same parts can be replaced as before: no module replaced, hooked or wrapped since.

        This is what a layer pays at every call for allowing such changes. weights=False ignores the weights: while a
        layer is not running, sharding replaces them by other kinds of tensors.
        """
        if not self.reasons_are_classes or self.parents != self.children or [*map(type, self.modules)] != self.classes:
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
