import copy
import dataclasses
import json
import pickle

import pytest
import transformers

from fastlm.models import BertConfig, GPT2Config
from fastlm.models.config import GELUS


@pytest.mark.parametrize("own, theirs", [(GPT2Config, transformers.GPT2Config), (BertConfig, transformers.BertConfig)])
def test_defaults_equal_hugging_faces(own, theirs):
    for field in dataclasses.fields(own):
        if field.name != "other":
            assert getattr(own(), field.name) == getattr(theirs(), field.name), field.name


@pytest.mark.parametrize(
    "config, expected",
    [
        (
            GPT2Config.preset("gpt2"),
            {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
        ),
        (GPT2Config.preset("gpt2-medium"), {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
        (GPT2Config.preset("gpt2-large"), {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
        (GPT2Config.preset("gpt2-xl"), {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
        (
            BertConfig.preset("bert-base"),
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        ),
        (
            BertConfig.preset("bert-large"),
            {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        ),
        (GPT2Config.preset("gpt2", n_layer=2), {"n_embd": 768, "n_layer": 2}),
    ],
)
def test_published_sizes(config, expected):
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    "theirs",
    [
        transformers.GPT2Config(n_embd=24, n_head=2, eos_token_id=7),
        transformers.BertConfig(num_labels=5, pad_token_id=None),
    ],
)
def test_config_json_round_trip(tmp_path, theirs):
    own_class = {"gpt2": GPT2Config, "bert": BertConfig}[theirs.model_type]
    theirs.save_pretrained(tmp_path)
    own = own_class.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(own.to_dict()))
    again = type(theirs).from_pretrained(tmp_path)
    assert again.to_diff_dict() == theirs.to_diff_dict()
    assert own_class.from_pretrained(tmp_path) == own


def test_num_labels_and_label_names():
    names = {"0": "NEGATIVE", "1": "NEUTRAL", "2": "POSITIVE"}
    config = BertConfig.from_dict({"id2label": names})
    assert config.num_labels == 3 and config.to_dict()["id2label"] == names
    assert BertConfig(num_labels=3).to_dict()["id2label"] == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert BertConfig.from_dict({"num_labels": 7}).num_labels == 7


def test_unknown_settings_are_kept():
    config = GPT2Config.from_dict(
        {
            "n_layer": 2,
            "summary_type": "mean",
            "task_specific_params": {"a": 1},
            "transformers_version": "4.0",
            "torch_dtype": "float16",
        }
    )
    saved = config.to_dict()
    assert saved["summary_type"] == "mean" and saved["task_specific_params"] == {"a": 1}
    assert "transformers_version" not in saved and "torch_dtype" not in saved  # set again on saving


def test_aliases():
    config = GPT2Config.from_dict(
        {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 5}
    )
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions) == (24, 2, 3, 5)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 2, 3)
    assert config.max_position_embeddings == 5
    with pytest.raises(AttributeError, match="'GPT2Config' object has no attribute 'intermediate_size'"):
        _ = config.intermediate_size
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("name", GELUS)
def test_every_gelu_name(name):
    import torch
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    torch.testing.assert_close(
        torch.nn.functional.gelu(x, approximate=GELUS[name]), ACT2FN[name](x), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: GPT2Config.from_dict({"add_cross_attention": True}),
            "add_cross_attention: expected False, the only supported value, got True",
        ),
        (
            lambda: BertConfig.from_dict({"is_decoder": True}),
            "is_decoder: expected False, the only supported value, got True",
        ),
        (
            lambda: BertConfig.from_dict({"position_embedding_type": "relative_key"}),
            "position_embedding_type: expected 'absolute', the only.*got 'relative_key'",
        ),
        (
            lambda: BertConfig.from_dict({"pruned_heads": {"0": [1]}}),
            r"pruned_heads: expected \{\}, the only supported value, got \{'0': \[1\]\}",
        ),
        (
            lambda: GPT2Config.from_dict({"quantization_config": {"bits": 4}}),
            "quantization_config: expected None, the only supported value",
        ),
        (
            lambda: GPT2Config.from_dict({"activation_function": "relu"}),
            "activation_function: expected one of gelu, .*, got 'relu'",
        ),
        (lambda: BertConfig(hidden_act="silu"), "hidden_act: expected one of gelu, .*, got 'silu'"),
        (lambda: BertConfig.from_dict({"model_type": "roberta"}), "model_type: expected 'bert', got 'roberta'"),
        (lambda: GPT2Config(activation_function="gleu_new"), "got 'gleu_new'; did you mean 'gelu_new'\\?$"),
        (lambda: GPT2Config(layer_norm_epsilon=0), "layer_norm_epsilon: expected a finite number > 0, got 0"),
        (lambda: GPT2Config(layer_norm_epsilon="x"), "layer_norm_epsilon: expected a finite number > 0, got 'x'"),
        (lambda: BertConfig(layer_norm_eps=None), "layer_norm_eps: expected a finite number > 0, got None"),
        (lambda: BertConfig(layer_norm_eps=float("nan")), "layer_norm_eps: expected a finite number > 0, got nan"),
        (lambda: GPT2Config(layer_norm_epsilon=True), "layer_norm_epsilon: expected a finite number > 0, got True"),
        (lambda: GPT2Config(initializer_range=-1), "initializer_range: expected a finite number >= 0, got -1"),
        (lambda: GPT2Config(resid_pdrop="0.1"), r"resid_pdrop: expected a probability in \[0, 1\), got '0.1'"),
        (lambda: GPT2Config(scale_attn_weights="false"), "scale_attn_weights: expected true or false, got 'false'"),
        (lambda: GPT2Config(tie_word_embeddings=1), "tie_word_embeddings: expected true or false, got 1"),
        (lambda: GPT2Config(eos_token_id="x"), "eos_token_id: expected a token id or null, got 'x'"),
        (lambda: GPT2Config(eos_token_id=[1, None]), r"eos_token_id: expected a token id or null, got \[1, None\]"),
        (lambda: BertConfig(pad_token_id=[0]), r"pad_token_id: expected a token id or null, got \[0\]"),
        (lambda: BertConfig.from_dict({"id2label": 3}), "id2label: expected a name for each label, got 3"),
        (lambda: GPT2Config(n_layer=0), "n_layer: expected an integer >= 1, got 0"),
        (lambda: GPT2Config(n_embd=10, n_head=3), "n_embd: expected a multiple of n_head = 3, got 10"),
        (lambda: GPT2Config(layer_norm_epsilon=0), "layer_norm_epsilon: expected a finite number > 0, got 0"),
        (lambda: BertConfig(layer_norm_eps="x"), "layer_norm_eps: expected a finite number > 0, got 'x'"),
        (lambda: GPT2Config(scale_attn_weights="false"), "scale_attn_weights: expected true or false, got 'false'"),
        (lambda: GPT2Config(eos_token_id=[1, "2"]), "eos_token_id: expected a token id or null, got"),
        (lambda: GPT2Config(attn_pdrop=1.0), r"attn_pdrop: expected a probability in \[0, 1\), got 1.0"),
        (
            lambda: BertConfig(classifier_dropout=-0.1),
            r"classifier_dropout: expected a probability in \[0, 1\), got -0.1",
        ),
        (lambda: BertConfig(pad_token_id=30522), r"pad_token_id: expected a token id in \[0, 30522\), got 30522"),
        (
            lambda: BertConfig(problem_type="ranking"),
            "problem_type: expected one of None, regression, .*, got 'ranking'",
        ),
        (
            lambda: GPT2Config.preset("gpt3"),
            "name: expected one of gpt2, gpt2-medium, gpt2-large, gpt2-xl, got 'gpt3'; did you mean 'gpt2'",
        ),
    ],
)
def test_errors_of_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"n_head": 5}', "n_embd: expected a multiple"),
    ],
)
def test_errors_of_files(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        GPT2Config.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"gpt2/config.json: no such file; .* \(nothing is downloaded\)"):
        GPT2Config.from_pretrained("gpt2")
