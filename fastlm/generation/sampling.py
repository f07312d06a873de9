"""From scores to the next token: the likeliest, or a draw from what temperature, top-k and top-p leave of the distribution."""

import dataclasses

import torch
from torch import Tensor

from fastlm.ops.boundary import mismatch


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose. temperature 0, or nothing given, takes the likeliest token; top_k or top_p alone sample at temperature 1.

    temperature: scores are divided by it: below 1 sharpens, above 1 flattens the distribution.
    top_k: only the k likeliest tokens (and ties of the last one) can be drawn.
    top_p: only the likeliest tokens whose probabilities just add up to p can be drawn (Holtzman et al., 2019, arXiv:1904.09751).
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise mismatch("temperature", "a number of at least 0", self.temperature)
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise mismatch("top_k", "a whole number of at least 1", self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise mismatch("top_p", "a probability in (0, 1]", self.top_p)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or (self.temperature is None and self.top_k is None and self.top_p is None)

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """logits (batch, vocabulary), in any dtype → token ids (batch,)."""
        logits = logits.float()
        if self.greedy:
            return logits.argmax(-1)
        probabilities = self.restricted(logits).softmax(-1)
        return (
            torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            if logits.is_cpu
            else drawn(probabilities, generator)
        )

    def restricted(self, logits: Tensor) -> Tensor:
        """The scores to draw from, -inf where the limits exclude a token. In this order: temperature, top-k, top-p, as Hugging Face applies them."""
        logits = logits / (self.temperature or 1.0)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ascending, order = logits.sort(-1)
            excluded = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            excluded[..., -1] = False  # rounding must not leave nothing
            logits = logits.masked_fill(excluded.scatter(-1, order, excluded), -torch.inf)
        return logits


def drawn(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """(batch, vocabulary) → (batch,), as torch.multinomial draws, which on a GPU reads back whether they are probabilities. Here that is a device assert.

    Of independent exponential variables E_i the p_i / E_i of token i is the largest with probability p_i.
    """
    torch._assert_async(probabilities.isfinite().all())
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1)
