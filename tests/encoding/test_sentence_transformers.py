"""SentenceTransformer.encode of an accelerated model against that of the model before."""

import copy
import pickle

import numpy
import pytest
import torch

import fastlm
from fastlm.integrations.encoding import forward
from fastlm.models.packing import Scatter
from tests.encoding.support import save, texts, write

sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install 'fastlm[test]'")
ATOL = 2e-5  # of values around 1, after two layers whose sums are added in another order


@pytest.fixture
def model(tmp_path):
    save(tmp_path, pooling={"pooling_mode_mean_tokens": True}, after=["Normalize"])
    prompts = {"query": "ab ac ad ", "document": ""}
    write(tmp_path / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None})
    return sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")


def accelerated(model):
    return fastlm.accelerate(copy.deepcopy(model))


def own(model, *args, **options):
    """The method, whether the model is accelerated or not."""
    return type(model).encode(model, *args, **options)


OPTIONS = [
    {},
    {"batch_size": 3},
    {"convert_to_tensor": True},
    {"convert_to_numpy": False},
    {"normalize_embeddings": True},
    {"truncate_dim": 5},
    {"truncate_dim": 5, "normalize_embeddings": True},
    {"prompt_name": "query"},
    {"prompt": "ba be ", "show_progress_bar": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_embeddings_and_their_type(model, options, monkeypatch):
    given = accelerated(model)
    monkeypatch.setattr(Scatter, "forward", None)  # nothing is padded
    for found in (texts(23, longest=12), numpy.array(texts(5, longest=12)), "ab ac"):
        expected, result = model.encode(found, **options), given.encode(found, **options)
        assert type(expected) is type(result) and len(expected) == len(result)
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=ATOL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(model, dtype):
    given, found = accelerated(model.to(dtype)), texts(9, longest=12)
    for options in ({}, {"convert_to_tensor": True}):
        expected, result = model.encode(found, **options), given.encode(found, **options)
        assert expected.dtype == result.dtype
        torch.testing.assert_close(torch.as_tensor(result), torch.as_tensor(expected), rtol=0, atol=0.02)


def test_queries_documents_and_the_mode(model, monkeypatch):
    given, found = accelerated(model).train(), texts(5, longest=12)
    monkeypatch.setattr(Scatter, "forward", None)  # nothing is padded
    for name in ("encode_query", "encode_document"):
        if hasattr(model, name):  # since version 5
            result, expected = getattr(given, name)(found), getattr(model, name)(found)
            torch.testing.assert_close(torch.from_numpy(result), torch.from_numpy(expected), rtol=0, atol=ATOL)
    assert not given.training


def test_batches_are_cut_by_tokens(model):
    given, found, sizes = accelerated(model), texts(40, longest=12), []
    given[0].auto_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(int(kwargs["attention_mask"].sum())), with_kwargs=True
    )
    given.encode(found)
    assert sizes == [sum(len(text.split()) + 2 for text in found)]
    sizes.clear()
    given.encode(found, batch_size=2)
    assert max(sizes) <= 2 * given.max_seq_length


@pytest.mark.parametrize(
    "options",
    [
        {"output_value": "token_embeddings"},
        {"output_value": None},
        {"precision": "ubinary"},
        {"device": "cpu"},
    ],
    ids=str,
)
def test_other_results_are_the_methods(model, options, monkeypatch):
    given, found = accelerated(model), texts(5, longest=12)
    expected = own(given, found, **options)
    monkeypatch.setattr(forward, "Runner", None)
    result = given.encode(found, **options)
    assert type(result) is type(expected) and len(result) == len(expected)


def test_a_hook_sees_the_method_call_its_module(model):
    seen = []
    given = accelerated(model)
    handle = given[1].register_forward_hook(lambda *_: seen.append(1))
    given.encode(texts(5))
    assert seen == [1]
    handle.remove()
    given.encode(texts(5))
    assert seen == [1]


def test_wrong_arguments_are_refused_as_before(model):
    given = accelerated(model)
    for options in ({"prompt_name": "qurey"}, {"batch_size": 0}, {"nothing": 1}):
        with pytest.raises((ValueError, TypeError)) as expected:
            model.encode(["ab"], **options)
        with pytest.raises(expected.type) as raised:
            given.encode(["ab"], **options)
        assert str(raised.value) == str(expected.value)
    assert len(given.encode([])) == 0


def test_copies_and_restore(model):
    given, found = accelerated(model), texts(5, longest=12)
    expected = given.encode(found)
    for copied in (copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        given[0].auto_model.embeddings.word_embeddings.weight.data.zero_()  # a copy must not refer to it
        assert (copied.encode(found) == expected).all()
    assert "encode" not in vars(fastlm.restore(given))
