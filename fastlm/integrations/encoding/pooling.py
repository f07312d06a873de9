"""One vector of the hidden states of a text, by the definitions of sentence-transformers.

Each text has its own rows: views of packed hidden states, or of padded ones. No mask is needed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastlm.core.errors import check_choice, wrong_type


def first(rows: Tensor, skip: int) -> Tensor:
    return rows[skip if len(rows) > skip else 0]


def weighted_mean(rows: Tensor, skip: int) -> Tensor:
    weights = torch.arange(1, len(rows) + 1, dtype=rows.dtype, device=rows.device)[skip:]
    return weights @ rows[skip:] / weights.sum().clamp(min=1)


# By name: from rows (tokens, width) and the number of tokens of the prompt, which are passed over.
MODES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda rows, skip: rows[skip:].sum(0) / max(len(rows) - skip, 1),
    "cls": first,
    "last": lambda rows, skip: rows[-1],
    "max": lambda rows, skip: rows[skip if len(rows) > skip else 0 :].amax(0),
    "weightedmean": weighted_mean,
    "mean_sqrt_len_tokens": lambda rows, skip: rows[skip:].sum(0) / max(len(rows) - skip, 1) ** 0.5,
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
    vectors = [torch.stack([MODES[mode](rows, skip) for rows in texts]) for mode in modes]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, 1)
