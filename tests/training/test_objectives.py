import pytest
import torch

import fastlm
from fastlm.training.data import load
from fastlm.training.models import build, objective_of
from fastlm.training.objectives import IGNORED, MaskedToken, NextToken
from fastlm.training.settings import Settings


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_next_token_pairs_are_one_apart():
    windows = torch.arange(20).view(2, 10)
    inputs, targets = NextToken().pairs(windows)
    assert torch.equal(inputs, windows[:, :-1]) and torch.equal(targets, windows[:, 1:])


def test_masked_token_shares():
    windows = torch.randint(50, (400, 101), generator=seeded())
    inputs, targets = MaskedToken(vocabulary=50, mask_token=51).pairs(windows, seeded(1))
    original = windows[:, :-1]
    chosen = targets != IGNORED
    assert torch.equal(targets[chosen], original[chosen])
    assert torch.equal(inputs[~chosen], original[~chosen])
    count = chosen.sum().item()
    masked = (inputs == 51)[chosen].sum().item()
    kept = (inputs == original)[chosen].sum().item()
    # 40,000 draws: three standard deviations are 0.0054 of all positions, 0.016 of the chosen 6,000; a random token is the original once in 50
    assert count / chosen.numel() == pytest.approx(0.15, abs=0.0054)
    assert masked / count == pytest.approx(0.8, abs=0.016)
    assert kept / count == pytest.approx(0.1 + 0.1 / 50, abs=0.016)
    assert inputs.max() == 51 and (inputs != 50).all()  # never the padding token


def test_masked_token_follows_the_generator_and_never_predicts_nothing():
    objective, windows = (
        MaskedToken(vocabulary=5, mask_token=6),
        torch.zeros(500, 3, dtype=torch.long),
    )  # two positions: none chosen in 7 of 10
    first, again, other = (objective.pairs(windows, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert (first[1] != IGNORED).any(1).all()


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox\n" * 20)
    return lambda masked: load([tmp_path], masked=masked)


def test_next_token_loss_counts_every_position(corpus):
    settings = Settings(layers=1, heads=2, width=32, context=16)
    text = corpus(False)
    model = build(settings, text.tokenizer).eval()
    inputs, targets = NextToken().pairs(text.train[:34].long().view(2, 17))
    expected = torch.nn.functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(NextToken().loss(model, inputs, targets), expected)


def test_masked_token_trains_a_bert_that_knows_its_padding(corpus):
    text = corpus(True)
    settings = Settings(objective="masked-token", layers=1, heads=2, width=32, context=16)
    model = build(settings, text.tokenizer)
    objective = objective_of(settings, text.tokenizer)
    assert isinstance(model, fastlm.models.BertForMaskedLM)
    assert (objective.vocabulary, objective.mask_token, model.config.pad_token_id, model.config.vocab_size) == (
        256,
        257,
        256,
        258,
    )
    inputs, targets = objective.pairs(text.train[:34].long().view(2, 17), seeded())
    logits = model.eval()(input_ids=inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(objective.loss(model.train(), inputs, targets), expected)


def test_masked_token_needs_a_tokenizer_with_a_mask(corpus):
    with pytest.raises(
        ValueError, match=r"tokenizer: expected one with \[PAD\] and \[MASK\] for masked tokens, got one without"
    ):
        objective_of(Settings(objective="masked-token"), corpus(False).tokenizer)
