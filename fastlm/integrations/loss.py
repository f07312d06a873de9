"""The loss of language-model heads without the logits, in training mode with labels.

The head's own forward computes everything in front of the vocabulary: it is called without labels, while its output projection hands its input on, and
what comes out as logits are the hidden states that the loss is computed from. So there is no copy of any head's forward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

import fastlm
from fastlm.integrations.blocks import not_plain
from fastlm.integrations.patch import Patch, eager, patch_of, put, watched

FEW = 0.9  # below this share of rows with a label, gathering those is cheaper than computing the others


def projection(patch: Patch, args: tuple, kwargs: dict) -> Any:
    """Forward of an output projection: its class's, but while a loss is being computed the input itself."""
    return args[0] if patch.held else patch.original(*args, **kwargs)


def hold(head: Any, options: dict) -> Patch | None:
    """The patch of a head's output projection, made where there is none: resizing the vocabulary brings a new module."""
    decoder = head.get_output_embeddings()
    if decoder is None or not_plain(decoder):
        return None
    patch = patch_of(decoder)
    if patch is None:
        patch = put(decoder, projection, None, options)
        patch.held = False
    return patch if patch.function is projection else None


def not_fused(patch: Patch, given: dict) -> str:
    """Why a call computes logits and loss as it did."""
    head, labels = patch.module, given.get("labels")
    if not head.training or labels is None:
        return "is not training with labels"
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.dtype.is_floating_point:
        return "labels are not one index per token"
    keep = given.get("logits_to_keep")
    if isinstance(keep, Tensor) or keep:
        return "logits_to_keep is given"
    if why := own_loss(patch):
        return why
    decoder = head.get_output_embeddings()
    if decoder is None:
        return "has no output projection"
    why = not_plain(decoder)
    return f"its output projection {why}" if why else watched(labels)


def own_loss(patch: Patch) -> str:
    """The property `loss_function` is not asked: the first time it logs a warning, which torch.compile cannot trace."""
    if not patch.family:
        return ""
    own = patch.module.__dict__
    chosen = own.get("_loss_function") or LOSS_MAPPING.get(own.get("loss_type"), ForCausalLMLoss)
    standard = chosen is ForCausalLMLoss and type(patch.module).loss_function is PreTrainedModel.loss_function
    return "" if standard else "has a loss function of its own"


def head(patch: Patch, args: tuple, kwargs: dict) -> Any:
    given = patch.bind(args, kwargs)
    if not_fused(patch, given) or (held := hold(patch.module, patch.options)) is None:
        return patch.original(*args, **kwargs)
    causal, labels = patch.family, given.pop("labels")
    settings = {name: given.pop(name) for name in ("num_items_in_batch", "ignore_index", "shift_labels") if name in given}
    return_dict = given.pop("return_dict", None)
    if causal and "use_cache" in patch.names and "GPT2" not in type(patch.module).__name__:
        given["use_cache"] = False  # as these heads do when they see labels
    held.held = True
    try:
        output = patch.original(**given, return_dict=True)
    finally:
        held.held = False
    hidden = output["logits"]
    output["loss"] = causal_loss(hidden, held.module, labels, **settings) if causal else masked_loss(hidden, held.module, labels)
    output["logits"] = None
    output = type(output)(loss=output["loss"], **{name: x for name, x in output.items() if name not in ("loss", "logits")})
    wanted = patch.module.config.return_dict if return_dict is None else return_dict
    return output if wanted else output.to_tuple()


def causal_loss(hidden, decoder, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None):
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    if num_items_in_batch is None:
        return loss_of(hidden, decoder, shift_labels, ignore_index, "mean")
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    return loss_of(hidden, decoder, shift_labels, ignore_index, "sum") / num_items_in_batch


def masked_loss(hidden, decoder, labels):
    return loss_of(hidden, decoder, labels, -100, "mean")


def loss_of(hidden, decoder, labels, ignore_index, reduction):
    x, target = hidden.flatten(0, -2), labels.flatten().to(hidden.device, torch.int64)
    if x.is_cpu and eager(x, target):  # elsewhere counting them would wait for the GPU, or end the graph
        counted = (target != ignore_index).nonzero()[:, 0]
        if counted.shape[0] < FEW * target.shape[0]:
            x, target = x.index_select(0, counted), target[counted]
    return fastlm.linear_cross_entropy(x, decoder.weight, target, decoder.bias, ignore_index=ignore_index, reduction=reduction)
