"""Encoders without padding: the class's forward runs on packed hidden states if nothing reads them between layers."""

from typing import Any

from torch import nn

from fastlm.integrations.capture import captured_outputs, is_idle
from fastlm.integrations.families import Family
from fastlm.integrations.layers import LayerPatch
from fastlm.integrations.packing import Gather, Scatter, pack_by_mask
from fastlm.integrations.patch import MASK_ARGUMENTS, Patch, observed_reason, patch_of


class EncoderPatch(Patch):
    """The forward of the module that runs the layers."""

    def __init__(self, encoder: Any, family: Family, options: dict[str, bool]) -> None:
        super().__init__(encoder, options)
        self.family = family

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.bind(args, kwargs)
        input_name = self.names[0]
        hidden_states: Any = arguments.get(input_name)
        mask_name = next(name for name in self.names if name in MASK_ARGUMENTS)
        packed = None
        if not self.padding_reason(hidden_states, arguments):
            packed = pack_by_mask(arguments.get(mask_name), hidden_states)
        if packed is None:
            return self.original(*args, **kwargs)
        rows = Gather.apply(hidden_states.flatten(0, 1), packed.index)
        result = self.original(**{**arguments, input_name: rows[None], mask_name: packed})
        padded = Scatter.apply(result[0][0], packed.index, packed.batch * packed.tokens).view(hidden_states.shape)
        if isinstance(result, tuple):
            return padded, *result[1:]
        result["last_hidden_state"] = padded
        return result

    def layers(self) -> dict[str, nn.Module]:
        return self.module._modules[self.family.layers]._modules

    def padding_reason(self, hidden_states: Any, arguments: dict) -> str:
        """Why padding cannot be removed: hidden states are read between layers, or a layer is not replaced."""
        if reason := observed_reason(hidden_states):
            return reason
        for name in ("encoder_hidden_states", "past_key_values", "cache", "output_hidden_states", "output_attentions"):
            if arguments.get(name) is not None and arguments[name] is not False:
                return f"{name} is given"
        if any(mask is not None for mask in arguments.get("head_mask") or ()):
            return "head_mask is given"
        if captured_outputs():
            return "hidden states or attentions are captured"
        for name, layer in self.layers().items():
            if reason := layer_reason(layer):
                return f"{self.family.layers}.{name} {reason}"
        return ""


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
    """Whether a hook may read what goes into or comes out of a module. Those of sharding do not."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        for hook in hooks.values():
            if not is_idle(hook) and not str(getattr(hook, "__module__", "")).startswith("torch.distributed."):
                return True
    return False
