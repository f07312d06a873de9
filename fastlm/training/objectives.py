"""Training objectives: they turn windows of tokens into inputs and targets, and compute the loss.

Windows and random draws stay on the CPU, so that all devices train on the same batches; the trainer moves them to the
model's device.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastlm.ops.linear_cross_entropy import linear_cross_entropy

IGNORED = -100  # target of a position that is not predicted
CHOSEN = 0.15  # fraction of positions that BERT predicts
MASKED, REPLACED = 0.8, 0.1  # fractions of the chosen positions; the others keep their token


class NextToken:
    """Every position predicts the next token."""

    def pairs(self, windows: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def loss(self, model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        # Not model(labels=…), which shifts the labels and so ignores the last position, the one with the most context.
        hidden = model.base_model(input_ids=inputs)
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
        vocabulary: number of ordinary tokens, from which replacements are drawn.
        mask_token: id of the mask token.
    """

    def __init__(self, vocabulary: int, mask_token: int):
        self.vocabulary, self.mask_token = vocabulary, mask_token

    def pairs(self, windows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs = windows[:, :-1].contiguous()
        choice, corruption = torch.rand((2, *inputs.shape), generator=generator)
        chosen = choice < CHOSEN
        chosen[:, 0] |= ~chosen.any(1)  # at least one per window, so that the mean loss of a batch is defined
        targets = inputs.masked_fill(~chosen, IGNORED)
        random = torch.randint(self.vocabulary, inputs.shape, generator=generator)
        corrupted = torch.where(
            corruption < MASKED, self.mask_token, torch.where(corruption < MASKED + REPLACED, random, inputs)
        )
        return torch.where(chosen, corrupted, inputs), targets

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return model(input_ids=inputs, labels=targets).loss
