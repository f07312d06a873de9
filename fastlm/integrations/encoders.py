"""Encoders without padding: the class's forward runs on packed sequences if nothing reads what is between its modules.

An encoder takes hidden states, or tokens, which it also embeds. Either are packed before its forward, and its result is
padded again.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from fastlm.integrations.capture import captured_outputs, is_idle
from fastlm.integrations.described import describe
from fastlm.integrations.families import Family
from fastlm.integrations.layers import PACKED_ARGUMENT, WINDOW_MASK, LayerPatch
from fastlm.integrations.packing import pack, pack_by_mask, packed_results
from fastlm.integrations.patch import MASK_ARGUMENTS, Patch, observed_reason, patch_of, sizes_may_depend_on_values
from fastlm.models.compiled import CALL, Conditions, may_skip_modules
from fastlm.models.encode_layers import Description, encode_layers
from fastlm.models.packing import Gather, Packed, Scatter

OUTPUTS = ("output_hidden_states", "output_attentions")
# The hook on token embeddings for checkpointing. It only makes what they return require a gradient.
REQUIRE_GRADS = ("transformers.modeling_utils", "make_inputs_require_grads")
# Arguments of an encoder that its layers do not read, except for caches, which are arguments of their own.
NOT_READ = frozenset(("encoder_attention_mask", "position_ids", "return_dict", "use_cache"))
NO_LAYERS = nn.ModuleList()
CHECKPOINTING_CALL = GradientCheckpointingLayer.__call__
# The forward of each class of encoders, as transformers defines it. A caller may replace it.
own_forwards: dict[type, Any] = {}


class EncoderPatch(Patch):
    """The forward of the module that runs the layers."""

    def __init__(self, encoder: Any, family: Family, options: dict[str, bool]) -> None:
        super().__init__(encoder, options)
        self.family = family
        self.takes_tokens = family.encoder_input == "tokens"
        # In transformers 4 it makes two masks of tokens × tokens, with and without padding.
        self.makes_masks = WINDOW_MASK in self.names
        self.mask_name = next((name for name in self.names if name in MASK_ARGUMENTS), MASK_ARGUMENTS[0])
        self.describe_anew()
        self.remember_forward()

    def __getstate__(self) -> dict[str, Any]:
        """A copy describes its own model."""
        return {name: value for name, value in self.__dict__.items() if name not in ("description", "surroundings")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.describe_anew()
        self.remember_forward()

    def describe_anew(self) -> None:
        self.description = new_description()
        self.surroundings: Any = None  # of direct.py

    def remember_forward(self) -> None:
        kind = type(self.module)
        if is_of_transformers(kind.forward):
            own_forwards.setdefault(kind, kind.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.bind(args, kwargs)
        if not self.takes_tokens and (result := self.run_compiled(arguments)) is not None:
            return result
        call = self.packed_tokens(arguments) if self.takes_tokens else self.packed_hidden_states(arguments)
        if call is None:
            return self.original(*args, **kwargs)
        packed, changed = call
        return self.padded(self.run(packed, {**arguments, **changed}), packed)

    def run_compiled(self, arguments: dict) -> Any:
        """The result, if all layers can run in one call of compiled code; None if they cannot."""
        x, mask = arguments.get(self.names[0]), arguments.get(self.mask_name)
        if type(x) is not Tensor or x.dim() != 3 or not may_skip_modules(x) or captured_outputs():
            return None
        kind = type(self.module)
        if self.gives_more(arguments) or own_forwards.get(kind) is not kind.forward:
            return None
        layers = self.description.layers(self.module._modules[self.family.layers])
        packed = None if layers is None or mask is None else pack_by_mask(mask, x, always=True)
        if layers is None or (packed is None and mask is not None):
            return None
        if packed is not None and packed.index.shape[0] == x.shape[0] * x.shape[1]:
            packed = None  # without padding
        if packed is not None:
            x = Gather.apply(x.flatten(0, 1), packed.index)[None]
        x = encode_layers(layers, x, packed)
        if x is None:
            return None
        result = self.without_layers({**arguments, self.names[0]: x})
        return result if packed is None else self.padded(result, packed)

    def gives_more(self, arguments: dict) -> bool:
        """Whether layers may read an argument besides hidden states and mask."""
        for name, value in arguments.items():
            if value is None or value is False or name in NOT_READ or name in (self.names[0], self.mask_name):
                continue
            if not isinstance(value, list) or any(each is not None for each in value):  # a head mask of each layer
                return True
        return False

    def without_layers(self, arguments: dict) -> Any:
        """What the class's forward returns of an encoder without layers: its input, in the form that is requested."""
        encoder, own = object.__new__(type(self.module)), self.module.__dict__
        encoder.__dict__.update(own, _modules={**own["_modules"], self.family.layers: NO_LAYERS})
        return type(self.module).forward(encoder, **arguments)

    def padded(self, result: Any, packed: Packed) -> Any:
        """The result on packed sequences as the caller takes it."""
        if (taken := packed_results.get()) is not None:
            taken.append(packed)
            return result
        rows = result[0][0]
        shape = (packed.batch, packed.tokens, rows.shape[1])
        padded = Scatter.apply(rows, packed.index, packed.batch * packed.tokens).view(shape)
        pooler = self.module._modules.get("pooler") if self.takes_tokens else None
        if isinstance(result, tuple):
            return padded, *(result[1:] if pooler is None else (pooler(padded), *result[2:]))
        result["last_hidden_state"] = padded
        if pooler is not None:  # it read the first token of the packed batch
            result["pooler_output"] = pooler(padded)
        return result

    def run(self, packed: Packed, arguments: dict) -> Any:
        """The class's forward on packed sequences."""
        if self.family.positions != "relative":
            return self.original(**arguments)
        # It makes the bias of the scores for the shape of its hidden states, and it must be that of the padded batch.
        x = arguments[self.names[0]]
        bias = self.module.compute_position_bias(x.new_empty(1, packed.tokens, 0))
        for layer in self.layers().values():
            x = layer(x, attention_mask=packed, position_bias=bias)[0]
        return BaseModelOutput(last_hidden_state=x) if arguments.get("return_dict") else (x,)

    def packed_hidden_states(self, arguments: dict) -> tuple[Packed, dict[str, Any]] | None:
        """How a call is packed, and its arguments that change; None if it runs with padding."""
        input_name, mask_name = self.names[0], self.mask_name
        hidden_states: Any = arguments.get(input_name)
        if self.padding_reason(hidden_states, arguments):
            return None
        packed = pack_by_mask(arguments.get(mask_name), hidden_states)
        if packed is None:
            return None
        rows = Gather.apply(hidden_states.flatten(0, 1), packed.index)
        return packed, {input_name: rows[None], mask_name: packed}

    def packed_tokens(self, arguments: dict) -> tuple[Packed, dict[str, Any]] | None:
        """The same of an encoder that takes token ids or their embeddings, and makes masks and tables of positions."""
        ids, embeds, mask = (arguments.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        if (ids is None) == (embeds is None):
            return None
        x: Any = embeds if ids is None else ids
        if not sizes_may_depend_on_values(x) or self.padding_reason(x, arguments):
            return None
        batch_tokens = x.shape[:2]
        if mask is None and self.makes_masks:
            mask = torch.ones(batch_tokens, dtype=torch.bool, device=x.device)
        if not isinstance(mask, Tensor) or mask.shape != batch_tokens:
            return None
        packed = pack(mask != 0, at_end=bool(self.family.window), always=self.makes_masks)
        if packed is None:
            return None
        index, positions = packed.index, arguments.get("position_ids")
        if positions is None:
            positions = index % packed.tokens
        else:
            positions = positions.expand(batch_tokens).flatten()[index]
        changed: dict[str, Any] = {"position_ids": positions[None], PACKED_ARGUMENT: packed}
        if (kinds := arguments.get("token_type_ids")) is not None:
            changed["token_type_ids"] = kinds.expand(batch_tokens).flatten()[index][None]
        if embeds is None:
            changed["input_ids"] = x.flatten()[index][None]
        else:
            changed["inputs_embeds"] = Gather.apply(x.flatten(0, 1), index)[None]
        # Layers do not read what is made of this.
        changed["attention_mask"] = None
        if self.makes_masks:
            changed["attention_mask"] = torch.ones(1, 1, dtype=torch.bool, device=x.device)
        elif self.family.window:
            changed["attention_mask"] = dict.fromkeys(self.module.config.layer_types)
        return packed, changed

    def layers(self) -> dict[str, nn.Module]:
        return self.module._modules[self.family.layers]._modules

    def padding_reason(self, x: Any, arguments: dict) -> str:
        """Why padding cannot be removed: hidden states are read between modules, or a layer is not replaced."""
        if reason := observed_reason(x):
            return reason
        for name in ("encoder_hidden_states", "past_key_values", "cache", *OUTPUTS):
            if arguments.get(name) is not None and arguments[name] is not False:
                return f"{name} is given"
        if any(mask is not None for mask in arguments.get("head_mask") or ()):
            return "head_mask is given"
        if captured_outputs():
            return "hidden states or attentions are captured"
        if self.takes_tokens and (reason := self.reason_around_layers(arguments)):
            return reason
        for name, layer in self.layers().items():
            if reason := layer_reason(layer):
                return f"{self.family.layers}.{name} {reason}"
        return ""

    def reason_around_layers(self, arguments: dict) -> str:
        """Why what an encoder computes beside its layers needs padding."""
        config = self.module.config
        for name in OUTPUTS:
            if arguments.get(name) is None and getattr(config, name):
                return f"the configuration says {name}"
        for name in (WINDOW_MASK, PACKED_ARGUMENT, "indices", "max_seqlen"):
            if arguments.get(name) is not None:
                return f"{name} is given"
        if self.makes_masks and config._attn_implementation not in ("eager", "sdpa"):
            return f"attn_implementation is {config._attn_implementation}"
        for path, child in self.module._modules.items():
            if path != self.family.layers:
                for name, module in child.named_modules(prefix=path):
                    if has_user_hook(module):
                        return f"has a hook at {name}"
        return ""


def is_of_transformers(function: Any) -> bool:
    """Whether the function, and each that it wraps, is defined in transformers."""
    while function is not None:
        if not getattr(function, "__globals__", {}).get("__name__", "").startswith("transformers."):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def new_description() -> Description:
    # Layers of transformers have a class with a `__call__` of its own, which checkpoints.
    calls = CALL, CHECKPOINTING_CALL
    return Description(describe, Conditions((LayerPatch,), calls, is_idle))


def layer_reason(layer: Any) -> str:
    """Why a layer needs padded hidden states."""
    patch = patch_of(layer)
    if not isinstance(patch, LayerPatch) or not patch.options["attention"]:
        return "is left alone"
    if has_user_hook(layer):
        return "has a hook"
    parts = patch.current_parts()
    if not parts.all_replaceable:
        for name, module in layer.named_modules():
            if has_user_hook(module):
                return f"has a hook at {name}"
    return parts.attention_reason or parts.block_reason


def has_user_hook(module: Any) -> bool:
    """Whether a hook may read what goes into or comes out of a module. Those of sharding and checkpointing do not."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        for hook in hooks.values():
            home = str(getattr(hook, "__module__", ""))
            harmless = home.startswith("torch.distributed.") or (home, getattr(hook, "__name__", "")) == REQUIRE_GRADS
            if not harmless and not is_idle(hook):
                return True
    return False
