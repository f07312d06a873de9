"""One vector of the hidden states of a text, by the definitions of sentence-transformers.

Each text has its own rows: views of packed hidden states, or of padded ones. No mask is needed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastlm.core.errors import check_choice, wrong_type


def first(rows: Tensor, skip: int) -> Tensor:
    i = skip if len(rows) > skip else 0
    return rows[i : i + 1]


def without_prompt(rows: Tensor, skip: int) -> Tensor:
    return rows[skip:] if skip else rows


def mean(rows: Tensor, skip: int) -> Tensor:
    rows = without_prompt(rows, skip)
    return rows.mean(0, keepdim=True) if len(rows) else rows.sum(0, keepdim=True)


def mean_sqrt_len_tokens(rows: Tensor, skip: int) -> Tensor:
    rows = without_prompt(rows, skip)
    return rows.sum(0, keepdim=True) / max(len(rows), 1) ** 0.5


def maximum(rows: Tensor, skip: int) -> Tensor:
    return without_prompt(rows, skip if len(rows) > skip else 0).amax(0, keepdim=True)


def weighted_mean(rows: Tensor, skip: int) -> Tensor:
    weights = torch.arange(1, len(rows) + 1, dtype=rows.dtype, device=rows.device)[skip:]
    return (weights @ rows[skip:] / weights.sum().clamp(min=1))[None]


# By name: from rows (tokens, width) and the number of tokens of the prompt, which are passed over, to (1, width).
MODES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": mean,
    "cls": first,
    "last": lambda rows, skip: rows[-1:],
    "max": maximum,
    "weightedmean": weighted_mean,
    "mean_sqrt_len_tokens": mean_sqrt_len_tokens,
}
OTHER_NAMES = {"lasttoken": "last"}  # in sentence-transformers


def check_pooling(pooling: object) -> str:
    if not isinstance(pooling, str):
        raise wrong_type("pooling", f"one of {', '.join(MODES)}", pooling)
    pooling = OTHER_NAMES.get(pooling, pooling)
    check_choice("pooling", pooling, tuple(MODES))
    return pooling


def pool(texts: Sequence[Tensor], modes: Sequence[str], skip: int) -> Tensor:
    """(len(texts), len(modes) · width) in float32.

    Args:
        texts: the rows of each, in float32.
        modes: whose vectors are concatenated.
        skip: the number of tokens of a prompt that is not pooled.
    """
    return joined([joined([MODES[mode](rows, skip) for rows in texts], 0) for mode in modes], 1)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
