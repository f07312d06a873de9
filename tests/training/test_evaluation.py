import math

import pytest
import torch
from torch.nn import functional as F

from fastlm.models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from fastlm.training.evaluation import (
    IGNORED,
    batched,
    score_causal,
    score_masked,
    sliding_windows,
    special_tokens,
)
from fastlm.training.tokenizers import MASK, byte_tokenizer
from tests.encoding import support

TEXTS = ["for line in lines:\n    print(line)\n", "naïve", "", "x"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=8, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5)
    return GPT2LMHeadModel(config).train()


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 10, 16, 17, 30])
@pytest.mark.parametrize("context, stride", [(8, 8), (8, 3), (8, 1), (1, 1)])
@pytest.mark.parametrize("piece", [3, 100])
def test_every_token_is_predicted_once(length, context, stride, piece):
    ids, seen = torch.arange(length), []
    for inputs, targets in sliding_windows(ids.split(piece), context, stride):
        assert len(inputs) == len(targets) == min(context, length - 1)
        predicted = targets != IGNORED
        assert torch.equal(targets[predicted], inputs[predicted] + 1)
        before = predicted.nonzero()[:, 0] + 1  # number of tokens that a target is predicted from
        assert all(n >= min(target, context - stride + 1) for n, target in zip(before, targets[predicted], strict=True))
        seen += targets[predicted].tolist()
    assert seen == list(range(1, length))


def test_batches_have_one_length():
    windows = [(torch.zeros(n), torch.zeros(n)) for n in (3, 3, 3, 2, 3)]
    assert [tuple(inputs.shape) for inputs, _ in batched(windows, 2)] == [(2, 3), (1, 3), (1, 2), (1, 3)]


@pytest.mark.parametrize("stride", [1, 8])
def test_causal_against_logits(model, stride):
    """Token by token; the model is in evaluation mode meanwhile."""
    score = score_causal(model, byte_tokenizer(masked=False), TEXTS, stride=stride)
    assert model.training
    nats, tokens = 0.0, 0
    with torch.no_grad():
        model.eval()
        for text in TEXTS:
            ids = torch.tensor(list(text.encode()))
            for i in range(1, len(ids)):
                start = max(0, i - 8) if stride == 1 else min((i - 1) // 8 * 8, max(0, len(ids) - 9))
                nats += F.cross_entropy(model(ids[None, start:i]).logits[0, -1], ids[i]).item()
                tokens += 1
        model.train()
    size = sum(len(text.encode()) for text in TEXTS)
    assert (score.tokens, score.bytes) == (tokens, size)
    assert score.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert score.bits_per_byte == pytest.approx((nats + 3 * math.log(256)) / math.log(2) / size, rel=1e-5)


def test_windows_keep_the_ids_of_one():
    """Whatever the length of the text."""
    read = 0

    def pieces():
        nonlocal read
        for piece in torch.arange(1000).split(10):
            read += len(piece)
            yield piece

    for inputs, _ in sliding_windows(pieces(), 8, 4):
        assert read - int(inputs[0]) <= 8 + 4 + 10
        assert inputs.untyped_storage().nbytes() <= 8 * (8 + 8 + 10)


def test_texts_in_parts(model):
    """The same bits as of the text as a whole."""
    tokenizer, text = byte_tokenizer(masked=False), "".join(TEXTS * 5)
    assert score_causal(model, tokenizer, [iter(text[i : i + 7] for i in range(0, len(text), 7)), iter(())]) == (
        score_causal(model, tokenizer, [text, ""])
    )
    tokenizer = byte_tokenizer(masked=True)
    mask = tokenizer.token_to_id(MASK)
    assert score_masked(bert(258), tokenizer, mask, [iter(text)]) == score_masked(bert(258), tokenizer, mask, [text])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"context": 9}, "context: expected at most 8, the context of the model, got 9"),
        ({"stride": 0}, "stride: expected an integer >= 1, got 0"),
        ({"context": 4, "stride": 5}, "stride: expected at most 4, the context, got 5"),
        ({"texts": ["x"]}, "data: expected a text of at least two tokens, got none"),
    ],
)
def test_errors(model, arguments, message):
    with pytest.raises(ValueError) as error:
        score_causal(model, byte_tokenizer(masked=False), **{"texts": TEXTS, **arguments})
    assert str(error.value) == message


def bert(vocabulary):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=vocabulary, max_position_embeddings=8, **sizes))


def test_masked():
    """A model that always predicts one byte is right as often as it occurs."""
    tokenizer = byte_tokenizer(masked=True)
    model, mask = bert(258), tokenizer.token_to_id(MASK)
    with torch.no_grad():
        model.get_parameter(model.ties().get("cls.predictions.decoder.bias", "cls.predictions.bias"))[97] = 100.0
    score = score_masked(model, tokenizer, mask, ["a" * 300 + "b" * 100] * 10)
    # 15 % of 500 windows of 8 tokens, and one where none would be chosen.
    assert score.tokens == 4000 and score.masked == pytest.approx(500 * (8 * 0.15 + 0.85**8), rel=0.05)
    assert score.accuracy == pytest.approx(0.75, abs=0.08)
    assert score.loss == pytest.approx(100 * (1 - score.accuracy), rel=0.02)
    again = score_masked(model, tokenizer, mask, ["a" * 300 + "b" * 100] * 10)
    other = score_masked(model, tokenizer, mask, ["a" * 300 + "b" * 100] * 10, seed=1)
    assert again == score != other


def test_special_tokens_surround_each_window():
    tokenizer = support.tokenizer().backend_tokenizer
    before, after = special_tokens(tokenizer)
    assert [tokenizer.id_to_token(i) for i in (*before, *after)] == ["[CLS]", "[SEP]"]
    model, seen = bert(tokenizer.get_vocab_size()), []
    model.register_forward_pre_hook(lambda module, arguments: seen.extend(arguments[0].tolist()))
    score_masked(model, tokenizer, tokenizer.token_to_id(MASK), ["a b c a b c a b"], context=6)
    assert all([row[0], row[-1]] == [*before, *after] and len(row) <= 6 for row in seen) and len(seen) >= 2
    assert special_tokens(byte_tokenizer(masked=True)) == ([], [])


def test_a_tokenizer_without_a_mask():
    with pytest.raises(ValueError, match="tokenizer: expected a tokenizer with a mask token, got one without"):
        score_masked(bert(258), byte_tokenizer(masked=False), None, TEXTS)
