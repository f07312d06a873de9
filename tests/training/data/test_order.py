"""The order of training: permutations, the same batch however it is divided, and the statistics of the draws."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.training.batches import evaluation_batches, spread, training_batch
from fastlm.training.data import Tokens
from fastlm.training.data.order import draws, keys_of, permuted, starts
from fastlm.training.objectives import MaskedToken, NextToken
from fastlm.training.settings import Settings

SIZES = Settings(layers=1, heads=1, width=8, context=4, batch=3)


def numbered(count):
    """A text of which each id is its own place."""
    return Tokens([np.arange(count, dtype=np.uint32)])


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(count, seed, epoch):
    *keys, _ = keys_of(seed, epoch)
    assert sorted(permuted(np.arange(count), count, tuple(keys)).tolist()) == list(range(count))


def test_a_permutation_takes_no_memory():
    """Of the windows of a text that is larger than any disk."""
    *keys, _ = keys_of(0, 0)
    some = np.arange(10**15, 10**15 + 1000)
    images = permuted(some, 3 * 10**18, tuple(keys))
    assert len(set(images.tolist())) == 1000 and images.min() >= 0 and images.max() < 3 * 10**18
    assert 0.45 < (images < 1.5 * 10**18).mean() < 0.55


def epoch_of(number, *, tokens, context, batch, seed=0):
    """The beginnings of the windows of an epoch."""
    count = (tokens - 1) // context
    every = [
        starts(seed, step, range(batch), batch=batch, tokens=tokens, context=context)
        for step in range((number + 1) * count // batch + 1)
    ]
    return torch.cat(every)[number * count : (number + 1) * count]


@pytest.mark.parametrize("tokens, context, batch", [(101, 4, 3), (103, 4, 25), (40, 4, 64), (9, 8, 2), (1000, 1, 7)])
def test_an_epoch_has_all_windows_once(tokens, context, batch):
    count, epochs = (tokens - 1) // context, []
    for number in range(3):
        begins = epoch_of(number, tokens=tokens, context=context, batch=batch)
        ordered = begins.sort().values
        assert (ordered.diff() == context).all() and len(begins) == count
        assert 0 <= ordered[0] <= (tokens - 1) % context and ordered[-1] + context < tokens
        epochs.append(((begins - ordered[0]) // context).tolist())
    if count > 20:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_epochs_begin_at_different_tokens():
    firsts = {epoch_of(number, tokens=104, context=10, batch=10).min().item() for number in range(40)}
    assert firsts == {0, 1, 2, 3}


def test_permutations_are_uniform():
    """Each of 12 windows comes at each place of an epoch equally often."""
    counts = np.zeros((12, 12))
    for epoch in range(2400):
        *keys, _ = keys_of(7, epoch)
        counts[np.arange(12), permuted(np.arange(12), 12, tuple(keys))] += 1
    squared = ((counts - 200) ** 2 / 200).sum()  # chi-squared with 121 degrees of freedom: 121 ± 16
    assert squared < 121 + 4 * 16


def test_the_order_depends_on_the_seed():
    orders = {tuple(epoch_of(0, tokens=101, context=4, batch=5, seed=seed).tolist()) for seed in range(20)}
    assert len(orders) == 20


@pytest.mark.parametrize("objective", [NextToken(), MaskedToken(200, 199)], ids=["next", "masked"])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_have_the_parts_of_the_batch(objective, processes):
    sizes = dataclasses.replace(SIZES, batch=12, objective="next-token")
    text = numbered(150)
    for step in (0, 1, 30):
        whole = training_batch(text, sizes, objective, step)
        bounds = [rank * 12 // processes for rank in range(processes + 1)]
        parts = [
            training_batch(text, sizes, objective, step, range(begin, end)) for begin, end in itertools.pairwise(bounds)
        ]
        for joined, expected in zip(zip(*parts, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(joined), expected)


def test_a_step_does_not_depend_on_those_before():
    one = [training_batch(numbered(150), SIZES, MaskedToken(200, 199), step) for step in range(60)]
    for step in (59, 12, 0):
        again = training_batch(numbered(150), SIZES, MaskedToken(200, 199), step)
        assert all(torch.equal(a, b) for a, b in zip(again, one[step], strict=True))
    assert len({tuple(targets.flatten().tolist()) for _, targets in one}) == 60


def test_batches_are_windows_and_the_next_tokens():
    inputs, targets = training_batch(numbered(150), SIZES, NextToken(), 3)
    assert inputs.shape == targets.shape == (3, 4) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(4)) and torch.equal(targets, inputs + 1)


def test_draws_are_independent_and_uniform():
    numbers = torch.stack([draws(3, step, range(8), 64) for step in range(50)]) / 2**32  # (steps, places, 3, tokens)
    assert 0.49 < numbers.mean() < 0.51 and 0.079 < numbers.var() < 0.088  # 1/12
    for dim in range(4):
        pairs = torch.stack([numbers.narrow(dim, i, numbers.shape[dim] - 1).flatten() for i in (0, 1)])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 0.02
    assert torch.equal(draws(3, 5, range(2, 4), 64), draws(3, 5, range(8), 64)[2:4])
    assert not torch.equal(draws(3, 2**32, range(2), 8), draws(3, 0, range(2), 8))
    assert not torch.equal(draws(2**32, 0, range(2), 8), draws(0, 0, range(2), 8))


def test_evaluation_covers_short_texts():
    batches = list(evaluation_batches(numbered(41), dataclasses.replace(SIZES, context=10), NextToken()))
    assert [len(targets) for _, targets in batches] == [3, 1]
    # The first token of a window is not predicted.
    assert torch.cat([targets for _, targets in batches]).flatten().tolist() == list(range(1, 41))


def test_evaluation_is_evenly_spaced_in_long_texts():
    begins = spread(100_000, 10, max_tokens=100)
    assert len(begins) == 10 and begins[0] == 0 and begins[-1] == 100_000 - 11
    assert begins.diff().max() - begins.diff().min() <= 1
    assert spread(5, 4, 100).tolist() == [0]


def test_evaluations_mask_the_same_tokens():
    first, again = (list(evaluation_batches(numbered(150), SIZES, MaskedToken(200, 199))) for _ in range(2))
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
