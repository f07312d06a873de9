import pytest
import torch

import fastlm
from fastlm.training.data import load
from fastlm.training.data.order import draws
from fastlm.training.models import build, objective_of
from fastlm.training.objectives import IGNORED, MaskedToken, NextToken
from fastlm.training.settings import Settings
from fastlm.training.tokenizers import byte_tokenizer


def drawn(windows, seed=0):
    return draws(seed, 0, range(len(windows)), windows.shape[1] - 1)


def test_next_token_pairs():
    windows = torch.arange(20).view(2, 10)
    inputs, targets = NextToken().pairs(windows)
    assert torch.equal(inputs, windows[:, :-1]) and torch.equal(targets, windows[:, 1:])


def test_masked_token_fractions():
    windows = torch.randint(50, (400, 101), generator=torch.Generator().manual_seed(0))
    inputs, targets = MaskedToken(vocabulary=52, mask_token=51, special=[50, 51]).pairs(windows, drawn(windows))
    original = windows[:, :-1]
    chosen = targets != IGNORED
    assert torch.equal(targets[chosen], original[chosen])
    assert torch.equal(inputs[~chosen], original[~chosen])
    count = chosen.sum().item()
    masked = (inputs == 51)[chosen].sum().item()
    kept = (inputs == original)[chosen].sum().item()
    # Three standard deviations: 0.0054 for 40,000 positions, 0.016 for the 6,000 chosen ones. A random token equals the
    # original with probability 1/50.
    assert count / chosen.numel() == pytest.approx(0.15, abs=0.0054)
    assert masked / count == pytest.approx(0.8, abs=0.016)
    assert kept / count == pytest.approx(0.1 + 0.1 / 50, abs=0.016)
    assert inputs.max() == 51 and (inputs != 50).all()  # no padding token


def test_masked_token_is_reproducible_and_predicts_at_least_one_position():
    objective = MaskedToken(vocabulary=7, mask_token=6)
    windows = torch.zeros(500, 3, dtype=torch.long)  # two positions: without the rule, none in 72 % of the windows
    first, again, other = (objective.pairs(windows, drawn(windows, seed)) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert (first[1] != IGNORED).any(1).all()


def test_whole_words():
    """All tokens of a word are chosen or none, as often as tokens are without."""
    text = "the unbelievable naïve readers re-read 2024 " * 200
    tokenizer = byte_tokenizer(masked=True)
    settings = Settings(objective="masked-token", whole_words=True, layers=1, heads=1, width=8, context=500)
    objective = objective_of(settings, tokenizer)
    ids = torch.tensor(tokenizer.encode(text).ids)
    windows = ids[: len(ids) // 501 * 501].view(-1, 501)
    inputs, targets = objective.pairs(windows, drawn(windows))
    chosen = targets != IGNORED
    letters = (windows >= 128) | torch.tensor([chr(i).isalnum() for i in range(256)])[windows]
    inside = letters[:, 1:-1] & letters[:, :-2]
    assert (chosen[:, 1:] == chosen[:, :-1])[inside].all() and not chosen.all(1).any()
    assert 0.1 < chosen.float().mean() < 0.2
    assert 0.75 < (inputs == objective.mask_token)[chosen].float().mean() < 0.85  # of each token by itself
    positions = torch.arange(501).expand_as(windows) % 3  # documents of three tokens
    packed, targets = objective.pairs(windows, drawn(windows), positions)
    chosen = targets != IGNORED
    begins = positions[:, 1:-1] == 0
    assert packed.shape == (len(windows), 2, 500) and torch.equal(packed[:, 1], positions[:, :-1])
    assert (chosen[:, 1:] == chosen[:, :-1])[inside & ~begins].all()
    assert not (chosen[:, 1:] == chosen[:, :-1])[inside & begins].all()


def test_masks_of_a_real_vocabulary():
    """Special tokens, whatever their ids, do not replace others."""
    objective = MaskedToken(20, mask_token=4, special=range(5))
    windows = torch.full((300, 65), 7)
    inputs, targets = objective.pairs(windows, drawn(windows))
    replaced = inputs[(inputs != 7) & (inputs != 4)]
    assert set(replaced.tolist()) == {5, 6, *range(8, 20)} and (targets[inputs != 7] == 7).all()


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox\n" * 20)
    return lambda masked: load([tmp_path], masked=masked)


def test_next_token_loss_includes_every_position(corpus):
    settings = Settings(layers=1, heads=2, width=32, context=16)
    text = corpus(False)
    model = build(settings, text.tokenizer).eval()
    inputs, targets = NextToken().pairs(text.train[:34].view(2, 17))
    expected = torch.nn.functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(NextToken().loss(model, inputs, targets), expected)


def test_next_token_loss_is_that_of_capped_logits():
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    config = fastlm.models.Gemma2Config(**sizes, num_attention_heads=4, final_logit_softcapping=0.5)
    model = fastlm.models.CausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30)
    inputs, targets = torch.randint(50, (2, 9)), torch.randint(50, (2, 9))
    logits = model(input_ids=inputs).logits
    assert 0.4 < logits.abs().max() <= 0.5
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(NextToken().loss(model, inputs, targets), expected)


def test_masked_token_model_and_loss(corpus):
    text = corpus(True)
    settings = Settings(objective="masked-token", layers=1, heads=2, width=32, context=16)
    model = build(settings, text.tokenizer)
    objective = objective_of(settings, text.tokenizer)
    assert isinstance(model, fastlm.models.BertForMaskedLM)
    assert objective.ordinary.tolist() == list(range(256))
    assert (objective.mask_token, model.config.pad_token_id, model.config.vocab_size) == (257, 256, 258)
    windows = text.train[:34].view(2, 17)
    inputs, targets = objective.pairs(windows, drawn(windows))
    logits = model.eval()(input_ids=inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(objective.loss(model.train(), inputs, targets), expected)


def test_masked_token_needs_special_tokens(corpus):
    with pytest.raises(
        ValueError,
        match=r"tokenizer: expected a tokenizer with \[MASK\] or <mask> for masked-token training, got one without",
    ):
        objective_of(Settings(objective="masked-token"), corpus(False).tokenizer)
