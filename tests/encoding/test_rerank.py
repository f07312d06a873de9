"""fastlm.rerank against sentence-transformers' CrossEncoder."""

import copy
import re

import pytest
import torch

import fastlm
from fastlm.models import Encoder
from tests.encoding.support import WORDS, save, texts, tokenizer
from tests.integrations.support import tiny

sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install 'fastlm[test]'")
ATOL = 2e-5  # of scores around 1
HEAD = "ForSequenceClassification"


def reranker(family="Bert", **changes):
    torch.manual_seed(1)
    return tiny(family, HEAD, num_labels=1, **changes)


def expected_scores(model, query, found):
    words, scores = tokenizer(), []
    for text in found:
        inputs = words(query, text, truncation=True, max_length=48, return_tensors="pt")
        inputs = {k: v for k, v in inputs.items() if k != "token_type_ids" or model.config.model_type == "bert"}
        scores.append(model(**inputs).logits[0, 0].detach())
    return torch.stack(scores)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("family", ["Bert", "XLMRoberta", "DistilBert", "ModernBert"])
def test_scores(family, accelerated):
    model = reranker(family)
    found, query = texts(23), "ab ac"
    given = fastlm.accelerate(copy.deepcopy(model)) if accelerated else model
    options = {"tokenizer": tokenizer(), "max_tokens_per_batch": 100}
    scores = fastlm.rerank(given, query, found, activation="identity", **options)
    assert scores.shape == (23,) and scores.dtype == torch.float32
    expected = expected_scores(model, query, found)
    torch.testing.assert_close(scores, expected, rtol=0, atol=ATOL)
    torch.testing.assert_close(fastlm.rerank(given, query, found, **options), expected.sigmoid(), rtol=0, atol=ATOL)


@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
def test_models_of_this_package(family, tmp_path):
    directory, found = save(tmp_path, family, HEAD, num_labels=1), texts(23)
    scores = fastlm.rerank(Encoder.from_pretrained(directory), "ab ac", found, tokenizer=directory)
    torch.testing.assert_close(scores, fastlm.rerank(directory, "ab ac", found), rtol=0, atol=ATOL)


@pytest.mark.parametrize("activation", [None, "Identity", "Sigmoid"])
def test_directories_and_cross_encoders(tmp_path, activation):
    settings = {} if activation is None else {"activation_fn": f"torch.nn.{activation}"}
    named = {} if activation is None else {"sentence_transformers": settings | {"version": "5"}}
    save(tmp_path, head=HEAD, num_labels=1, **named)
    model = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    if activation is not None:
        assert type(model.activation_fn).__name__ == activation
    found = texts(9)
    expected = torch.from_numpy(model.predict([("ab ac", text) for text in found]))
    torch.testing.assert_close(fastlm.rerank(tmp_path, "ab ac", found), expected, rtol=0, atol=ATOL)
    torch.testing.assert_close(fastlm.rerank(model, "ab ac", found), expected, rtol=0, atol=ATOL)
    with pytest.warns(UserWarning, match="^1 of 2 pairs has more than 48 tokens; the first 48 were read$"):
        long = [" ".join(WORDS[:60]), "ab"]
        scores = fastlm.rerank(tmp_path, "ab ac", long)
    expected = torch.from_numpy(model.predict([("ab ac", text) for text in long]))
    torch.testing.assert_close(scores, expected, rtol=0, atol=ATOL)


def test_a_cross_encoder_with_more_than_a_transformers_model(tmp_path):
    save(tmp_path, head=HEAD, num_labels=1)
    model = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    if not isinstance(model, torch.nn.Sequential):
        pytest.skip("before version 5.4 there is nothing else in it")
    model.append(torch.nn.Identity())
    with pytest.raises(ValueError, match=r"^model: expected a CrossEncoder .* alone, got one with Identity$"):
        fastlm.rerank(model, "ab", ["ab"])


def test_no_text():
    assert fastlm.rerank(reranker(), "ab", [], tokenizer=tokenizer()).shape == (0,)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"query": 3}, "query: expected a string, got 3"),
        ({"texts": "ab"}, "texts: expected an iterable of strings, got 'ab'"),
        ({"activation": "relu"}, "activation: expected one of 'sigmoid', 'identity', got 'relu'"),
        ({"model": tiny("Bert")}, "model: expected a model for .* with one label, got BertModel of 2"),
        ({"model": tiny("Bert", HEAD, num_labels=3)}, "model: expected .* one label, got .*Classification of 3"),
        ({"model": tiny("Bert", num_labels=1)}, r"model: expected results of shape \(1, 1\) .*, got .* from BertModel"),
        ({"model": "none"}, "model: none/config.json: no such file; .*"),
    ],
)
def test_wrong_arguments(options, message):
    arguments = {"model": reranker(), "query": "ab", "texts": ["ab"], "tokenizer": tokenizer(), **options}
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        fastlm.rerank(arguments.pop("model"), arguments.pop("query"), arguments.pop("texts"), **arguments)
    assert re.fullmatch(message, str(raised.value)), str(raised.value)


def test_a_directory_without_the_weights_of_the_head(tmp_path):
    save(tmp_path, num_labels=1)
    with pytest.raises(ValueError, match=r"expected all weights of a .*Classification, got none for classifier"):
        fastlm.rerank(tmp_path, "ab", ["ab"])


def test_nan_names_the_weight():
    model = reranker()
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^model: expected finite weights, got NaN in classifier.bias$"):
        fastlm.rerank(model, "ab", ["ab"], tokenizer=tokenizer())
