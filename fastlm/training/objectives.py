"""What a model learns to predict: windows of tokens become inputs and targets, inputs and targets become a loss.

Windows and draws stay on the CPU, so that every device trains on the same batches; the trainer takes them to the model's.
"""

from typing import Any

import torch
from torch import Tensor, nn

import fastlm

IGNORED = -100  # the target of a position that is not predicted
CHOSEN, MASKED, REPLACED = (
    0.15,
    0.8,
    0.1,
)  # BERT's shares: of the positions; of the chosen ones (the rest stay as they are)


class NextToken:
    """Every token of the context predicts the one after it."""

    def pairs(self, windows: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def loss(self, model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        # model(labels=…) shifts inside and so leaves the last position, the one with the longest context, without a target
        hidden = model.transformer(input_ids=inputs)
        return fastlm.linear_cross_entropy(
            hidden.last_hidden_state.flatten(0, 1), model.output_weight(hidden), targets.flatten()
        )


class MaskedToken:
    """15 % of the positions are predicted from both sides: 80 % of them masked, 10 % replaced at random, 10 % kept (Devlin et al., 2018, arXiv:1810.04805)."""

    def __init__(self, vocabulary: int, mask_token: int):
        self.vocabulary, self.mask_token = vocabulary, mask_token

    def pairs(self, windows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs = windows[:, :-1].contiguous()
        position, fate = torch.rand((2, *inputs.shape), generator=generator)
        chosen = position < CHOSEN
        chosen[:, 0] |= ~chosen.any(
            1
        )  # a window in which nothing is predicted would teach nothing; a batch of them has no mean
        targets = inputs.masked_fill(~chosen, IGNORED)
        random = torch.randint(self.vocabulary, inputs.shape, generator=generator)
        corrupted = torch.where(fate < MASKED, self.mask_token, torch.where(fate < MASKED + REPLACED, random, inputs))
        return torch.where(chosen, corrupted, inputs), targets

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return model(input_ids=inputs, labels=targets).loss
