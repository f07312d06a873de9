"""What a forward pass accepts. Shapes are checked everywhere; values on the CPU alone, because on a GPU reading them would make the host wait."""

import torch
from torch import Tensor

from fastlm.ops.boundary import mismatch, opaque

IGNORE = -100  # a label with this value counts for nothing


def batch_and_tokens(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, embedding: Tensor, past: int, context: int
) -> tuple[int, int]:
    """Checks the one of the two that is given against the embedding (vocabulary, width) and the context; returns its (batch, tokens)."""
    if (input_ids is None) == (inputs_embeds is None):
        raise mismatch("input_ids", "either input_ids or inputs_embeds", "neither" if input_ids is None else "both")
    if input_ids is not None:
        name, given = "input_ids", input_ids
        if given.dim() != 2:
            raise mismatch(name, "shape (batch, tokens)", tuple(given.shape))
        ids(name, given, below=embedding.shape[0], device=embedding.device)
    else:
        assert inputs_embeds is not None
        name, given = "inputs_embeds", inputs_embeds
        if given.dim() != 3 or given.shape[2] != embedding.shape[1]:
            raise mismatch(name, f"shape (batch, tokens, {embedding.shape[1]})", tuple(given.shape))
        if not given.is_floating_point():
            raise mismatch(name, "a floating-point dtype", given.dtype)
        if given.device != embedding.device:
            raise mismatch(name, f"a tensor on {embedding.device}, as the model", given.device)
    batch, tokens = given.shape[:2]
    if tokens == 0:
        raise mismatch(name, "at least one token", tuple(given.shape))
    if past + tokens > context:
        raise mismatch(
            name,
            f"at most {context} tokens, the context of the model",
            f"{tokens} after {past} in the cache" if past else tokens,
        )
    return batch, tokens


def ids(
    name: str,
    given: Tensor,
    *,
    below: int,
    device: torch.device,
    shape: tuple[int, ...] | None = None,
    ignore: int | None = None,
) -> None:
    """Integers in [0, below), or `ignore`. A first size of 1 stands for the whole batch where a shape is asked for and ignore is not."""
    if given.dtype not in (torch.int64, torch.int32):
        raise mismatch(name, "dtype torch.int64 or torch.int32", given.dtype)
    if given.device != device:
        raise mismatch(name, f"a tensor on {device}, as the model", given.device)
    if shape is not None and given.shape != shape and (ignore is not None or given.shape != (1, *shape[1:])):
        raise mismatch(name, f"shape {shape}, as the input", tuple(given.shape))
    if given.device.type == "cpu" and not opaque(given) and given.numel():
        low, high = torch.aminmax(given if ignore is None else given.masked_fill(given == ignore, 0))
        if low < 0 or high >= below:
            wanted = f"values in [0, {below})" if ignore is None else f"values in [0, {below}) or {ignore}"
            raise mismatch(name, wanted, int(low if low < 0 else high))


def key_padding(attention_mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor | None:
    """attention_mask (batch, tokens), non-zero at real tokens, as bool. Tokens in a cache count."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, tokens):
        raise mismatch(
            "attention_mask",
            f"shape ({batch}, {tokens}): one value for every token, those in the cache too",
            tuple(attention_mask.shape),
        )
    if attention_mask.device != device:
        raise mismatch("attention_mask", f"a tensor on {device}, as the model", attention_mask.device)
    return attention_mask.bool()
