"""Training objectives: they turn windows of tokens into inputs and targets, and compute the loss.

Windows and random draws stay on the CPU, so that all devices train on the same batches; the trainer moves them to the
model's device.

Inputs are (batch, tokens); with documents that attention does not cross they are (batch, 2, tokens): the tokens, and
the position of each in its document.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.models.packing import cu_seqlens_of
from fastlm.ops.linear_cross_entropy import linear_cross_entropy

IGNORED = -100  # target of a position that is not predicted
CHOSEN = 0.15  # fraction of positions that BERT predicts
MASKED, REPLACED = 0.8, 0.1  # fractions of the chosen positions; the others keep their token


class NextToken:
    """Every position predicts the next token, the last one of a document nothing."""

    def pairs(
        self, windows: Tensor, draws: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets of (batch, tokens + 1) windows.

        Args:
            draws: not used.
            positions: like windows: the positions of the tokens in their documents; None: in one stream.
        """
        inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        if positions is None:
            return inputs, targets
        return torch.stack((inputs, positions[:, :-1]), 1), targets.masked_fill(positions[:, 1:] == 0, IGNORED)

    def loss(self, model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        # Not model(labels=…), which shifts the labels and so ignores the last position, the one with the most context.
        hidden = model.base_model(**arguments(inputs))
        return linear_cross_entropy(
            hidden.last_hidden_state.flatten(0, 1),
            model.output_weight(hidden),
            targets.flatten(),
            softcap=model.logit_softcap,
        )


class MaskedToken:
    """15 % of the positions are predicted; of these, 80 % are masked, 10 % replaced by a random token, 10 % unchanged.

    Source: Devlin et al., 2018, arXiv:1810.04805.

    Args:
        vocabulary: number of tokens.
        mask_token: id of the mask token.
        special: ids from which no replacements are drawn.
        words: (begins, ends), bool, (vocabulary,): whether a token may begin inside a word, and end inside one. Then
            all tokens of a word are chosen or none; a token goes on with the word of the one before if that one ends
            inside a word and it begins inside one.
    """

    def __init__(
        self,
        vocabulary: int,
        mask_token: int,
        special: Sequence[int] = (),
        words: tuple[Tensor, Tensor] | None = None,
    ):
        ordinary = torch.ones(vocabulary, dtype=torch.bool)
        ordinary[list(special)] = False
        self.ordinary, self.mask_token, self.words = ordinary.nonzero()[:, 0], mask_token, words

    def pairs(self, windows: Tensor, draws: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of (batch, tokens + 1) windows.

        Args:
            draws: (batch, 3, tokens), random integers of 32 bits.
            positions: like windows: the positions of the tokens in their documents; None: in one stream.
        """
        inputs = windows[:, :-1].contiguous()
        choice, corruption, replacement = draws.unbind(1)
        if self.words is not None:
            choice = choice.gather(1, self.word_begins(inputs, positions))
        chosen = choice < int(CHOSEN * 2**32)
        # At least one per window, so that the mean loss of a batch is defined.
        chosen |= (choice == choice.min(1, keepdim=True).values) & ~chosen.any(1, keepdim=True)
        targets = inputs.masked_fill(~chosen, IGNORED)
        random = self.ordinary[replacement * len(self.ordinary) >> 32]
        masked, replaced = int(MASKED * 2**32), int((MASKED + REPLACED) * 2**32)
        corrupted = torch.where(
            corruption < masked, self.mask_token, torch.where(corruption < replaced, random, inputs)
        )
        inputs = torch.where(chosen, corrupted, inputs)
        return inputs if positions is None else torch.stack((inputs, positions[:, :-1]), 1), targets

    def word_begins(self, inputs: Tensor, positions: Tensor | None) -> Tensor:
        """For each token, the index of the first token of its word."""
        assert self.words is not None
        begins, ends = self.words
        goes_on = torch.zeros_like(inputs, dtype=torch.bool)
        goes_on[:, 1:] = begins[inputs[:, 1:]] & ends[inputs[:, :-1]]
        if positions is not None:
            goes_on &= positions[:, :-1] != 0
        index = torch.arange(inputs.shape[1]).expand_as(inputs)
        return index.masked_fill(goes_on, 0).cummax(1).values

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return model(**arguments(inputs), labels=targets).loss


def arguments(inputs: Tensor) -> dict[str, Tensor]:
    """The arguments of a model for inputs of an objective."""
    if inputs.dim() == 2:
        return {"input_ids": inputs}
    tokens, positions = inputs.unbind(1)
    return {"input_ids": tokens.contiguous(), "cu_seqlens": cu_seqlens_of(positions)}
