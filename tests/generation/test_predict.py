import pytest
import torch

from fastlm.generation import Tokenizer, load_tokenizer
from fastlm.generation.predict import predict
from fastlm.models import BertForMaskedLM
from fastlm.training.tokenizers import byte_tokenizer
from tests.models.hugging_face import encoder_like, ours_like, real, tiny_bert, tiny_encoder, tiny_gpt2


def tokenizer_of_bytes(masked):
    return Tokenizer(byte_tokenizer(masked=masked))


def test_next_token():
    model, tokenizer = ours_like(tiny_gpt2(vocab_size=256)), tokenizer_of_bytes(masked=False)
    rows = predict(model, tokenizer, "abc", top=7, temperature=0.5)
    with torch.no_grad():
        logits = model(torch.tensor([list(b"abc")])).logits[0, -1]
    best = logits.topk(7)
    assert [row.token for row in rows] == [tokenizer.token(i) for i in best.indices.tolist()]
    torch.testing.assert_close([row.score for row in rows], best.values.tolist())
    torch.testing.assert_close([row.probability for row in rows], (logits / 0.5).softmax(-1)[best.indices].tolist())
    assert {row.place for row in rows} == {0}


@pytest.mark.parametrize("family", ["Bert", "Roberta", "ModernBert"])
def test_every_mask(family):
    model, tokenizer = encoder_like(tiny_encoder(family, vocab_size=258)), tokenizer_of_bytes(masked=True)
    rows = predict(model, tokenizer, "ab[MASK]c[MASK]", top=3)
    with torch.no_grad():
        logits = model(torch.tensor([[97, 98, 257, 99, 257]])).logits[0, [2, 4]]
    assert [row.place for row in rows] == [0] * 3 + [1] * 3
    torch.testing.assert_close([row.score for row in rows], logits.topk(3).values.flatten().tolist())


def test_probabilities_sum_to_one_at_every_temperature():
    model, tokenizer = ours_like(tiny_gpt2(vocab_size=256)), tokenizer_of_bytes(masked=False)
    for temperature in (0.1, 1.0, 10.0):
        rows = predict(model, tokenizer, "abc", top=1000, temperature=temperature)
        assert len(rows) == 256 and abs(sum(row.probability for row in rows) - 1) < 1e-5
    flat, sharp = (predict(model, tokenizer, "abc", top=1, temperature=t)[0] for t in (10.0, 0.1))
    assert flat.score == sharp.score and flat.probability < sharp.probability
    for tiny in (1e-40, 5e-324):
        assert [row.probability for row in predict(model, tokenizer, "abc", top=2, temperature=tiny)] == [1.0, 0.0]


def test_dropout_is_disabled_and_the_mode_is_restored():
    model, tokenizer = ours_like(tiny_gpt2(vocab_size=256, resid_pdrop=0.5)).train(), tokenizer_of_bytes(masked=False)
    assert predict(model, tokenizer, "abc") == predict(model, tokenizer, "abc")
    assert model.training


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda gpt, bert: predict(gpt, tokenizer_of_bytes(False), ""), "text: expected at least one token, got ''"),
        (
            lambda gpt, bert: predict(gpt, tokenizer_of_bytes(False), "a" * 49),
            "text: expected at most 48 tokens, the context of the model, got 49",
        ),
        (
            lambda gpt, bert: predict(gpt, tokenizer_of_bytes(False), "a", top=0),
            "top: expected an integer >= 1, got 0",
        ),
        (
            lambda gpt, bert: predict(gpt, tokenizer_of_bytes(False), "a", temperature=0),
            "temperature: expected a finite number > 0, got 0",
        ),
        (
            lambda gpt, bert: predict(bert, tokenizer_of_bytes(True), "abc"),
            r"text: expected at least one \[MASK\], got 'abc'",
        ),
        (
            lambda gpt, bert: predict(bert, tokenizer_of_bytes(False), "a[MASK]"),
            "tokenizer: expected a tokenizer with a mask token, got one without",
        ),
        (
            lambda gpt, bert: predict(bert.bert, tokenizer_of_bytes(True), "a[MASK]"),
            "model: expected a model that predicts the next or a masked token, got a BertModel",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(ours_like(tiny_gpt2(vocab_size=256)), ours_like(tiny_bert(vocab_size=258)))


@pytest.mark.filterwarnings("ignore:.*not loaded, as")
def test_a_real_model():
    """Ethanol + acetic acid: the masked atom, double-bonded to the carbon of the carboxyl group, is oxygen."""
    directory = real("rxnfp/models/transformers/bert_pretrained")
    model, tokenizer = BertForMaskedLM.from_pretrained(directory), load_tokenizer(directory)
    rows = predict(model, tokenizer, "C C O . C C ( = [MASK] ) O", top=3)
    assert rows[0].token == "O" and rows[0].probability > 0.5
