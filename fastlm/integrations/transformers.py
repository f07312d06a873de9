"""fastlm.accelerate on transformers models. Its imports register attn_implementation="fastlm" (attention.py).

A model keeps its modules and parameters. Each layer, encoder and head gets a patch as its `forward` (patch.py). The
families are described in families.py, and layers.py computes their layers.
"""

import importlib
import inspect
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, __version__

from fastlm.integrations import attention as interface
from fastlm.integrations import views
from fastlm.integrations.encoders import EncoderPatch
from fastlm.integrations.families import FAMILIES
from fastlm.integrations.find import encoder_family, head_of, layer_family, norm_family
from fastlm.integrations.layers import LayerPatch
from fastlm.integrations.loss import HeadPatch
from fastlm.integrations.norms import NormPatch
from fastlm.integrations.patch import Patch, has_foreign_forward, patch_of, put
from fastlm.integrations.reporting import report

__all__ = ["accelerate", "report", "restore"]

M = TypeVar("M", bound=nn.Module)


def accelerate(
    model: M,
    *,
    attention: bool = True,
    layernorm: bool = True,
    mlp: bool = True,
    loss: bool = True,
    unpad: bool = True,
    strict: bool = True,
) -> M:
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError(
            "model: expected one that is not compiled yet (accelerate, then torch.compile), "
            "got the result of torch.compile"
        )
    restore(model)
    options = {"attention": attention, "layernorm": layernorm, "mlp": mlp, "loss": loss, "unpad": unpad}
    inside_layers: set[nn.Module] = set()
    for module in list(model.modules()):
        if not has_foreign_forward(module) and module not in inside_layers:
            patch_module(module, options)
        if layer_family(module) is not None:
            inside_layers.update(module.modules())
        if attention and isinstance(module, PreTrainedModel) and makes_masks(module):
            view_config(model, module)
    if strict and not (found := report(model)).replaced:
        reasons = "; ".join(f"{entry.module}: {entry.reason}" for entry in found.left_alone[:5])
        layers = ", ".join(sorted({family.layer for family in FAMILIES.values()}))
        raise ValueError(
            f"model: expected layers of {layers} to replace, got {type(model).__name__} "
            f"({reasons or 'no layer of a supported family'})"
        )
    return model


def patch_module(module: Any, options: dict[str, bool]) -> None:
    if (family := layer_family(module)) is not None:
        put(LayerPatch(module, family, options))
    elif options["attention"] and options["unpad"] and (family := encoder_family(module)) is not None:
        put(EncoderPatch(module, family, options))
    elif options["loss"] and (head := head_of(module)) is not None:
        patch = HeadPatch(module, head, options)
        put(patch)
        patch.projection_patch()
    elif options["layernorm"] and (family := norm_family(module)) is not None:
        put(NormPatch(module, family, options))


def restore(model: M) -> M:
    wrapped = [name or "the model" for name, module in model.named_modules() if wraps_patch(module)]
    if wrapped:
        raise RuntimeError(
            f"model: expected forwards as accelerate set them, got one wrapped by other code at "
            f"{', '.join(wrapped[:5])}; undo that first"
        )
    for module in model.modules():
        if (patch := patch_of(module)) is not None:
            patch.detach()
        if views.is_view(config := module.__dict__.get("config")):
            module.__dict__["config"] = views.original(config)
    return model


def wraps_patch(module: nn.Module) -> bool:
    """Whether other code has wrapped the patch in a forward of its own."""
    forward = module.__dict__.get("forward")
    if forward is None or isinstance(forward, Patch):
        return False
    return any(isinstance(x, Patch) for x in (module.__dict__.get("_old_forward"), inspect.unwrap(forward)))


# The attention implementation


def makes_masks(model: PreTrainedModel) -> bool:
    """Whether the model makes masks through transformers' attention interface, for layers of a supported family."""
    if not type(model)._supports_attention_backend or views.is_view(model.config):
        return False
    contains_model = any(isinstance(module, PreTrainedModel) for module in model.modules() if module is not model)
    return not contains_model and any(layer_family(module) is not None for module in model.modules())


def view_config(root: nn.Module, model: PreTrainedModel) -> None:
    """For the modules of a model, and for the heads around it, by whose configuration `generate` makes masks."""
    config = model.config
    view = views.view(config, config._attn_implementation)
    heads = [module for module in root.modules() if isinstance(module, PreTrainedModel) and model in module.modules()]
    for module in (*heads, *model.modules()):
        if module.__dict__.get("config") is config:
            module.__dict__["config"] = view


# transformers 4: most families choose the class of the attention module by the implementation's name


class Refusal:
    """Takes the place of an attention class under the name "fastlm"."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f'attn_implementation: expected "eager" or "sdpa", got {interface.NAME!r}: this model does not compute '
            "attention through the interface in this version of transformers. Load it without attn_implementation, "
            "then call fastlm.accelerate(model)"
        )


def refuse_by_name() -> None:
    for home in FAMILIES:
        for name, classes in vars(importlib.import_module(home)).items():
            if name.endswith("ATTENTION_CLASSES") and isinstance(classes, dict):
                classes.setdefault(interface.NAME, Refusal)


if int(__version__.partition(".")[0]) < 5:
    refuse_by_name()
