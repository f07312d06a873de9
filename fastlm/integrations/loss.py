"""The loss of language-model heads without the logits, in training mode with labels.

The head's own forward computes everything in front of the vocabulary: it is called without labels, while its output projection hands its input on, and
what comes out as logits are the hidden states that the loss is computed from. So there is no copy of any head's forward.

Where the output projection is tied to the token embedding, the embedding hands on the table that the loss then takes, so that the gradients of the two meet
in one tensor.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

import fastlm
from fastlm.integrations.blocks import not_plain
from fastlm.integrations.families import Head
from fastlm.integrations.patch import Patch, eager, patch_of, put, watched
from fastlm.models.layers import SharedTable

FEW = 0.9  # below this share of rows with a label, gathering those is cheaper than computing the others


def projection(patch: Patch, args: tuple, kwargs: dict) -> Any:
    """Forward of an output projection: its class's, but while a loss is being computed the input itself."""
    return args[0] if patch.held else patch.original(*args, **kwargs)


def hold(head: Any, options: dict) -> Patch | None:
    """The patch of a head's output projection, made where there is none: resizing the vocabulary brings a new module."""
    decoder = head.get_output_embeddings()
    if decoder is None or not_plain(decoder):
        return None
    return held_patch(decoder, projection, options)


def held_patch(module: nn.Module, function: Any, options: dict) -> Patch | None:
    patch = patch_of(module)
    if patch is None and "forward" not in module.__dict__:
        patch = put(module, function, None, options)
        patch.held, patch.table = False, None
    return patch if patch is not None and patch.function is function else None


def lookup(patch: Patch, args: tuple, kwargs: dict) -> Any:
    """Forward of a token embedding: its class's, but for the first call while a loss is being computed, which hands the table on too."""
    if (
        not patch.held
        or patch.table is not None
        or kwargs
        or len(args) != 1
        or not torch.is_grad_enabled()
        or not eager(args[0])
    ):
        return patch.original(*args, **kwargs)
    embedding = patch.module
    rows, patch.table = SharedTable.apply(embedding.weight, args[0], embedding.padding_idx)
    return rows


def hold_embedding(head: Any, decoder: Any, options: dict) -> Patch | None:
    """The patch of a head's token embedding, if its table is the output projection's and has a gradient."""
    table = decoder.weight
    if not eager(table) or not (table.is_cpu and table.requires_grad and torch.is_grad_enabled()):
        return None
    embedding = head.get_input_embeddings()
    if type(embedding) is not nn.Embedding or embedding.weight is not table:
        return None
    plain = embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse
    return held_patch(embedding, lookup, options) if plain else None


def not_fused(patch: Patch, given: dict) -> str:
    """Why a call computes logits and loss as it did."""
    head, labels = patch.module, given.get("labels")
    if not head.training or labels is None:
        return "is not training with labels"
    if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.dtype.is_floating_point:
        return "labels are not one index per token"
    if patch.family.other is not None and given.get(patch.family.other[0]) is None:
        return f"{patch.family.other[0]} is missing"
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
    own = patch.module.__dict__
    if patch.family.chosen:
        chosen = own.get("_loss_function") or LOSS_MAPPING.get(own.get("loss_type"), ForCausalLMLoss)
        standard = chosen is ForCausalLMLoss and type(patch.module).loss_function is PreTrainedModel.loss_function
    else:  # DistilBERT's is a module
        standard = (module := own["_modules"].get("mlm_loss_fct")) is None or plain_cross_entropy(module)
    return "" if standard else "has a loss function of its own"


def plain_cross_entropy(module: Any) -> bool:
    settings = (
        (module.weight, module.ignore_index, module.reduction, module.label_smoothing)
        if type(module) is nn.CrossEntropyLoss
        else ()
    )
    return settings == (None, -100, "mean", 0.0)


def head(patch: Patch, args: tuple, kwargs: dict) -> Any:
    given = patch.bind(args, kwargs)
    if not_fused(patch, given) or (held := hold(patch.module, patch.options)) is None:
        return patch.original(*args, **kwargs)
    about, labels = patch.family, given.pop("labels")
    settings = {
        name: given.pop(name) for name in ("num_items_in_batch", "ignore_index", "shift_labels") if name in given
    }
    return_dict = given.pop("return_dict", None)
    if about.chosen and "use_cache" in patch.names and "GPT2" not in type(patch.module).__name__:
        given["use_cache"] = False  # as these heads do when they see labels
    embedding = hold_embedding(patch.module, held.module, patch.options)
    try:
        held.held = True
        if embedding is not None:
            embedding.held = True
        output = patch.original(**given, return_dict=True)
        weight = held.module.weight if embedding is None or embedding.table is None else embedding.table
    finally:
        held.held = False
        if embedding is not None:
            embedding.held, embedding.table = False, None
    loss = loss_of(about, output[about.logits], weight, held.module.bias, labels, **(settings if about.chosen else {}))
    if about.other is not None:
        label, logits = given[about.other[0]], output[about.other[1]]
        loss = loss + F.cross_entropy(logits.view(-1, logits.shape[-1]), label.view(-1))
    output = type(output)(loss=loss, **{name: x for name, x in output.items() if name not in ("loss", about.logits)})
    wanted = patch.module.config.return_dict if return_dict is None else return_dict
    return output if wanted else output.to_tuple()


def loss_of(about: Head, hidden, weight, bias, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None):
    if about.shifted:
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    if num_items_in_batch is None:
        return cross_entropy(hidden, weight, bias, labels, ignore_index, "mean")
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    return cross_entropy(hidden, weight, bias, labels, ignore_index, "sum") / num_items_in_batch


def cross_entropy(hidden, weight, bias, labels, ignore_index, reduction):
    x, target = hidden.flatten(0, -2), labels.flatten().to(hidden.device, torch.int64)
    if x.is_cpu and eager(x, target):  # elsewhere counting them would wait for the GPU, or end the graph
        counted = (target != ignore_index).nonzero()[:, 0]
        if counted.shape[0] < FEW * target.shape[0]:
            x, target = x.index_select(0, counted), target[counted]
    return fastlm.linear_cross_entropy(x, weight, target, bias, ignore_index=ignore_index, reduction=reduction)
