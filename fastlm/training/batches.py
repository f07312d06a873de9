"""Batches: windows of the text as inputs and targets of an objective."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.training.data import Tokens
from fastlm.training.data.order import draws, starts
from fastlm.training.distributed import Group
from fastlm.training.objectives import IGNORED, MaskedToken, NextToken
from fastlm.training.settings import Settings

# Maximum number of tokens of an evaluation: the standard error is about 0.01 nats.
EVALUATED_TOKENS = 2**16
EVALUATION_SEED = 2**63  # of no run: a different one from every settings.seed

Objective = NextToken | MaskedToken
Pair = tuple[Tensor, Tensor]  # inputs and targets


def training_batch(
    tokens: Tokens, settings: Settings, objective: Objective, step: int, places: range | None = None
) -> Pair:
    """The batch of a step 0, 1, …, which depends on settings.seed, settings.batch, settings.context and the text only.

    Args:
        places: the sequences to return, a part of range(settings.batch), for one of several processes; None: all.
    """
    batch, context = settings.batch, settings.context
    places = range(batch) if places is None else places
    begins = starts(settings.seed, step, places, batch=batch, tokens=len(tokens), context=context)
    return pair(tokens, settings, objective, begins, settings.seed, step, places)


def evaluation_batches(
    tokens: Tokens, settings: Settings, objective: Objective, max_tokens: int = EVALUATED_TOKENS
) -> Iterator[Pair]:
    """Batches of at most settings.batch windows, the same at every evaluation.

    They are adjacent if max_tokens covers all tokens, else evenly spaced.
    """
    batch, context = settings.batch, settings.context
    for i, begins in enumerate(spread(len(tokens), context, max_tokens).split(batch)):
        yield pair(tokens, settings, objective, begins, EVALUATION_SEED, i, range(len(begins)))


def share_of(group: Group, pair: Pair) -> Pair:
    """The sequences of a batch that are those of this process."""
    inputs, targets = pair
    places = group.share(len(inputs))
    if not places:
        return inputs[:1], torch.full_like(targets[:1], IGNORED)
    return filled(group, len(inputs), (inputs[places.start : places.stop], targets[places.start : places.stop]))


def filled(group: Group, count: int, share: Pair) -> Pair:
    """The share of this process of a batch of `count` sequences, filled up to the size of the largest share.

    A copy without targets fills it up. All processes run the same passes then, which FSDP needs.
    """
    inputs, targets = share
    if len(inputs) == group.largest_share(count):
        return share
    return torch.cat([inputs, inputs[-1:]]), torch.cat([targets, torch.full_like(targets[-1:], IGNORED)])


def spread(tokens: int, context: int, max_tokens: int) -> Tensor:
    """Where windows of context + 1 tokens begin that are spread evenly over a text."""
    count = max(1, min((tokens - 1) // context, max_tokens // context))
    last = tokens - context - 1
    return torch.tensor([i * last // (count - 1) if count > 1 else 0 for i in range(count)])


def pair(
    tokens: Tokens, settings: Settings, objective: Objective, begins: Tensor, seed: int, step: int, places: range
) -> Pair:
    """Inputs and targets of the windows that begin there, with the random draws of these places of a step."""
    length = settings.context + 1
    windows = tokens.windows(begins, length)
    positions = tokens.positions(begins, length) if settings.documents == "packed" else None
    if isinstance(objective, MaskedToken):
        return objective.pairs(windows, draws(seed, step, places, settings.context), positions)
    return objective.pairs(windows, positions=positions)
