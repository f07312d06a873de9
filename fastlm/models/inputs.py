"""Checks of the inputs of a forward pass.

Shapes are checked on every device. Values are checked on a CPU only: reading them on a GPU would synchronise.
"""

import torch
from torch import Tensor

from fastlm.core.errors import check_floating, check_storage, check_tensor, mismatch
from fastlm.core.tracing import needs_custom_op

IGNORE_INDEX = -100  # a label with this value does not contribute to the loss


def check_tokens(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, embedding: Tensor, past: int, context: int
) -> tuple[int, int]:
    """Checks that exactly one of input_ids and inputs_embeds is given and valid.

    Args:
        embedding: (vocabulary, width).
        past: number of tokens in the cache.
        context: maximum number of tokens, those in the cache included.

    Returns:
        (batch, tokens).
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise mismatch("input_ids", "either input_ids or inputs_embeds", "neither" if input_ids is None else "both")
    if input_ids is not None:
        name, given = "input_ids", input_ids
        check_tensor(name, given)
        if given.dim() != 2:
            raise mismatch(name, "shape (batch, tokens)", tuple(given.shape))
        check_ids(name, given, below=embedding.shape[0], device=embedding.device)
    else:
        assert inputs_embeds is not None
        name, given = "inputs_embeds", inputs_embeds
        check_tensor(name, given)
        if given.dim() != 3 or given.shape[2] != embedding.shape[1]:
            raise mismatch(name, f"shape (batch, tokens, {embedding.shape[1]})", tuple(given.shape))
        check_floating(name, given)
        if given.device.type == "cpu" and not needs_custom_op(given):
            check_storage(name, given)
        if given.device != embedding.device:
            raise mismatch(name, f"a tensor on {embedding.device}, as the model", given.device)
    batch, tokens = given.shape[:2]
    if tokens == 0:
        raise mismatch(name, "at least one token", tuple(given.shape))
    if past + tokens > context:
        got = f"{tokens} after {past} in the cache" if past else tokens
        raise mismatch(name, f"at most {context} tokens, the context of the model", got)
    return batch, tokens


def check_ids(
    name: str,
    ids: Tensor,
    *,
    below: int,
    device: torch.device,
    shape: tuple[int, ...] | None = None,
    ignore_index: int | None = None,
) -> None:
    """Checks that ids are integers in [0, below) or ignore_index.

    If a shape is given without ignore_index, a batch size of 1 is accepted for any batch: it is broadcast.
    """
    check_tensor(name, ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise mismatch(name, "dtype torch.int64 or torch.int32", ids.dtype)
    if ids.device != device:
        raise mismatch(name, f"a tensor on {device}, as the model", ids.device)
    if shape is not None and ids.shape != shape and (ignore_index is not None or ids.shape != (1, *shape[1:])):
        raise mismatch(name, f"shape {shape}, as input_ids or inputs_embeds", tuple(ids.shape))
    if ids.device.type == "cpu" and not needs_custom_op(ids) and ids.numel():
        check_storage(name, ids)
        low, high = torch.aminmax(ids if ignore_index is None else ids.masked_fill(ids == ignore_index, 0))
        if low < 0 or high >= below:
            expected = f"values in [0, {below})" + ("" if ignore_index is None else f" or {ignore_index}")
            raise mismatch(name, expected, int(low if low < 0 else high))


def key_padding_mask(attention_mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor | None:
    """attention_mask (batch, tokens), non-zero at real tokens, as bool. `tokens` includes those in the cache."""
    if attention_mask is None:
        return None
    check_tensor("attention_mask", attention_mask)
    if attention_mask.shape != (batch, tokens):
        expected = f"shape ({batch}, {tokens}): one value per token, including those in the cache"
        raise mismatch("attention_mask", expected, tuple(attention_mask.shape))
    if attention_mask.device != device:
        raise mismatch("attention_mask", f"a tensor on {device}, as the model", attention_mask.device)
    if device.type == "cpu" and not needs_custom_op(attention_mask):
        check_storage("attention_mask", attention_mask)
    return attention_mask.bool()
