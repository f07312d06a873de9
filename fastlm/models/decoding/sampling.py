"""Selection of the next token from its logits: greedy, or sampling with temperature, top-k and top-p."""

import dataclasses

import torch
from torch import Tensor

from fastlm.core.errors import check_integer, check_number, mismatch

# float32 logits that differ at all differ by more than 1e-10 if they are as large as those of a model. Divided by less
# than this temperature, no two of them leave both a probability above 0, and large ones would overflow.
GREEDY_BELOW = 1e-20


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling parameters. The default, and a temperature below 1e-20, is greedy; top_k or top_p alone use 1.

    temperature: the logits are divided by it. Values below 1 sharpen the distribution, values above 1 flatten it.
    top_k: only the k most likely tokens can be drawn, and those tied with the last of them.
    top_p: only the smallest set of most likely tokens with total probability of at least p can be drawn
        (Holtzman et al., 2019, arXiv:1904.09751).
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None:
            expected = "a finite number >= 0"
            if check_number("temperature", self.temperature, expected) < 0:
                raise mismatch("temperature", expected, self.temperature)
        if self.top_k is not None:
            check_integer("top_k", self.top_k, "an integer >= 1", range(1, 2**63))
        if self.top_p is not None:
            expected = "a probability in (0, 1]"
            if not 0 < check_number("top_p", self.top_p, expected) <= 1:
                raise mismatch("top_p", expected, self.top_p)

    @property
    def greedy(self) -> bool:
        if self.temperature is None:
            return self.top_k is None and self.top_p is None
        return self.temperature < GREEDY_BELOW

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, vocabulary) logits of any dtype → (batch,) token ids."""
        logits = logits.float()
        if self.greedy:
            return logits.argmax(-1)
        probabilities = self.filtered(logits).softmax(-1)
        if logits.is_cpu:
            return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        return sample_without_sync(probabilities, generator)

    def filtered(self, logits: Tensor) -> Tensor:
        """The logits after temperature, top-k and top-p, in Hugging Face's order; -inf for excluded tokens."""
        logits = logits / (self.temperature or 1.0)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            threshold = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ascending, order = logits.sort(-1)
            excluded = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            excluded[..., -1] = False  # rounding must not exclude every token
            logits = logits.masked_fill(excluded.scatter(-1, order, excluded), -torch.inf)
        return logits


def sample_without_sync(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """(batch, vocabulary) → (batch,): the same draws as torch.multinomial, without its synchronisation.

    torch.multinomial reads back whether its input is valid; here that is a device-side assertion. For independent
    exponential variables E_i, p_i / E_i is the largest with probability p_i.
    """
    torch._assert_async(probabilities.isfinite().all())
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1)
