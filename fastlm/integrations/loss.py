"""The loss of language-model heads without logits, in training mode with labels.

The head's own forward is called without labels while its output projection keeps its input and returns no logits. From
these hidden states `fastlm.linear_cross_entropy` computes the loss. So no head's forward is copied here.

If the output projection is tied to the token embedding, the loss uses the table that the embedding's autograd function
returns. The two gradients of the table are then accumulated in one tensor.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss

from fastlm.integrations.families import Head
from fastlm.integrations.parts import projection_reason
from fastlm.integrations.patch import (
    Patch,
    descend,
    observed_reason,
    patch_of,
    put,
    sizes_may_depend_on_values,
)
from fastlm.models.layers import SharedTable
from fastlm.ops.linear_cross_entropy import linear_cross_entropy

# If a smaller share of the rows has a label, gathering these rows takes less time than computing the others.
GATHER_BELOW = 0.9
IGNORE_INDEX = -100


class ProjectionPatch(Patch):
    """The forward of an output projection. While a loss is computed it keeps its input and returns no logits."""

    keeps_input = False
    hidden: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.keeps_input:
            return self.original(*args, **kwargs)
        self.hidden = args[0]
        return self.hidden[..., :0]


class EmbeddingPatch(Patch):
    """The forward of a token embedding. While a loss is computed, the first call also makes its table available.

    A subclass of nn.Embedding is one that multiplies by `embed_scale`.
    """

    shares_table = False
    table: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            not self.shares_table
            or self.table is not None
            or kwargs
            or len(args) != 1
            or not torch.is_grad_enabled()
            or not sizes_may_depend_on_values(args[0])
        ):
            return self.original(*args, **kwargs)
        embedding = self.module
        rows, self.table = SharedTable.apply(embedding.weight, args[0], embedding.padding_idx)
        return rows if type(embedding) is nn.Embedding else rows * embedding.embed_scale.to(rows.dtype)


class HeadPatch(Patch):
    """The forward of a head."""

    def __init__(self, module: Any, head: Head, options: dict[str, bool]) -> None:
        super().__init__(module, options)
        self.head = head

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.bind(args, kwargs)
        if self.logits_reason(arguments) or (projection := self.projection_patch()) is None:
            return self.original(*args, **kwargs)
        head, labels = self.head, arguments.pop("labels")
        settings = {
            name: arguments.pop(name)
            for name in ("num_items_in_batch", "ignore_index", "shift_labels")
            if name in arguments
        }
        return_dict = arguments.pop("return_dict", None)
        if head.disables_cache and "use_cache" in self.names:
            arguments["use_cache"] = False
        if head.sparse and self.module.sparse_prediction:
            no_loss = labels == self.module.sparse_pred_ignore_index
            labels = labels.masked_fill(no_loss, settings.get("ignore_index", IGNORE_INDEX))
        output, hidden, weight = self.hidden_states(projection, arguments)
        softcap = None if head.softcap is None else getattr(self.module.config, head.softcap)
        loss = loss_of(
            head,
            hidden,
            weight,
            projection.module.bias,
            labels,
            softcap,
            **(settings if head.uses_loss_function else {}),
        )
        if head.second_loss is not None:
            label, logits = arguments[head.second_loss[0]], output[head.second_loss[1]]
            loss = loss + F.cross_entropy(logits.view(-1, logits.shape[-1]), label.view(-1))
        others = {name: value for name, value in output.items() if name not in ("loss", head.logits)}
        output = type(output)(loss=loss, **others)
        as_dict = self.module.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def hidden_states(self, projection: ProjectionPatch, arguments: dict) -> tuple[Any, Tensor, Tensor]:
        """The head's output without logits, and the input and the weight of the projection."""
        embedding = self.embedding_patch(projection.module)
        try:
            projection.keeps_input = True
            if embedding is not None:
                embedding.shares_table = True
            output = self.original(**arguments, return_dict=True)
            hidden: Any = projection.hidden
            table = None if embedding is None else embedding.table
        finally:
            projection.keeps_input, projection.hidden = False, None
            if embedding is not None:
                embedding.shares_table, embedding.table = False, None
        return output, hidden, projection.module.weight if table is None else table

    def projection_patch(self) -> Any:
        """Made when there is none: resizing the vocabulary makes a new module."""
        projection = descend(self.module, self.head.projection)
        if projection is None or projection_reason(projection, "linear"):
            return None
        return patch_for(projection, ProjectionPatch, self.options)

    def embedding_patch(self, projection: Any) -> Any:
        """None unless the embedding's table is the projection's weight and needs a gradient."""
        table = projection.weight
        if not sizes_may_depend_on_values(table):
            return None
        if not (table.is_cpu and table.requires_grad and torch.is_grad_enabled()):
            return None
        embedding = self.module.get_input_embeddings()
        kind = type(embedding)
        known = kind is nn.Embedding or f"{kind.__module__}.{kind.__qualname__}" == self.head.scaled_embedding
        if not known or embedding.weight is not table:
            return None
        plain = embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse
        return patch_for(embedding, EmbeddingPatch, self.options) if plain else None

    def logits_reason(self, arguments: dict) -> str:
        """Why a call computes logits and loss by the head's own forward."""
        module, head, labels = self.module, self.head, arguments.get("labels")
        if not module.training or labels is None:
            return "is not training with labels"
        if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.dtype.is_floating_point:
            return "labels are not one index per token"
        if head.second_loss is not None and arguments.get(head.second_loss[0]) is None:
            return f"{head.second_loss[0]} is missing"
        keep = arguments.get("logits_to_keep")
        if isinstance(keep, Tensor) or keep:
            return "logits_to_keep is given"
        return self.loss_reason() or self.projection_reason() or observed_reason(labels)

    def projection_reason(self) -> str:
        projection = descend(self.module, self.head.projection)
        reason = "is missing" if projection is None else projection_reason(projection, "linear")
        return f"its output projection {reason}" if reason else ""

    def loss_reason(self) -> str:
        """Why the head's loss is not the cross-entropy that is computed here.

        The property `loss_function` is not read: it logs a warning the first time, which torch.compile cannot trace.
        """
        own, head = self.module.__dict__, self.head
        standard = True
        if head.uses_loss_function:
            function = own.get("_loss_function") or LOSS_MAPPING.get(own.get("loss_type"), ForCausalLMLoss)
            standard = function is (ForCausalLMLoss if head.shifted else ForMaskedLMLoss)
            standard = standard and type(self.module).loss_function is PreTrainedModel.loss_function
        elif head.loss_module is not None:
            standard = is_plain_cross_entropy(own["_modules"].get(head.loss_module))
        return "" if standard else "has a loss function of its own"


def patch_for(module: nn.Module, kind: Any, options: dict[str, bool]) -> Any:
    """The patch of a module, made if there is none. None if the module has another patch or a forward of its own."""
    patch = patch_of(module)
    if patch is None and "forward" not in module.__dict__:
        patch = put(kind(module, options))
    return patch if type(patch) is kind else None


def is_plain_cross_entropy(module: Any) -> bool:
    if type(module) is not nn.CrossEntropyLoss:
        return False
    settings = (module.weight, module.ignore_index, module.reduction, module.label_smoothing)
    return settings == (None, IGNORE_INDEX, "mean", 0.0)


def loss_of(
    head: Head,
    hidden,
    weight,
    bias,
    labels,
    softcap=None,
    num_items_in_batch=None,
    ignore_index=IGNORE_INDEX,
    shift_labels=None,
):
    if head.shifted:
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    if num_items_in_batch is None:
        return cross_entropy(hidden, weight, bias, labels, ignore_index, "mean", softcap)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    return cross_entropy(hidden, weight, bias, labels, ignore_index, "sum", softcap) / num_items_in_batch


def cross_entropy(hidden, weight, bias, labels, ignore_index, reduction, softcap):
    x, target = hidden.flatten(0, -2), labels.flatten().to(hidden.device, torch.int64)
    if x.is_cpu and sizes_may_depend_on_values(x, target):  # on a GPU, counting labels would synchronize
        labelled = (target != ignore_index).nonzero()[:, 0]
        if labelled.shape[0] < GATHER_BELOW * target.shape[0]:
            x, target = x.index_select(0, labelled), target[labelled]
    return linear_cross_entropy(
        x, weight, target, bias, ignore_index=ignore_index, reduction=reduction, softcap=softcap
    )
