import json
import subprocess
import sys

import pytest
import torch

from fastlm import models
from fastlm.models import load_model
from tests.models.hugging_face import tiny_bert, tiny_gpt2


@pytest.mark.parametrize(
    "head", ["GPT2Model", "GPT2LMHeadModel", "BertModel", "BertForMaskedLM", "BertForSequenceClassification"]
)
def test_class_follows_architectures(tmp_path, head):
    (tiny_gpt2 if head.startswith("GPT2") else tiny_bert)(head).save_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is getattr(models, head)
    assert load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def update_config(directory, **changes):
    settings = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if value is not None})
    )


def test_class_follows_model_type_without_architectures(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    update_config(tmp_path, architectures=None)
    assert type(load_model(tmp_path)) is models.GPT2LMHeadModel
    update_config(tmp_path, model_type=None)
    with pytest.raises(
        ValueError,
        match=r"config.json: model_type: expected one of gpt2, bert, llama, .*, got None; call from_pretrained",
    ):
        load_model(tmp_path)


def test_bert_for_pre_training(tmp_path):
    tiny_bert("BertForPreTraining").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no such parameter: .*cls.seq_relationship.weight"):
        assert type(load_model(tmp_path)) is models.BertForMaskedLM


def test_unsupported_class_is_an_error(tmp_path):
    tiny_bert("BertForQuestionAnswering").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"config.json: architectures: expected one of GPT2Model, .*, got BertForQuestionAnswering"
    ):
        load_model(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["fastlm.models", "fastlm.generation", "fastlm.generation.predict"])
def test_imports_in_any_order_without_transformers(first):
    code = f"import {first}, fastlm.models, fastlm.generation, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_making_and_loading_models_does_not_import_the_compiler(tmp_path):
    """It takes a second. PyTorch imports it for random numbers on the meta device, for example."""
    code = f"""
import sys
from fastlm.models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, load_model
GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)).save_pretrained({str(tmp_path / "gpt2")!r})
sizes = {{"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}}
BertForMaskedLM(BertConfig(**sizes)).save_pretrained({str(tmp_path / "bert")!r})
for name in ("gpt2", "bert"):
    load_model({str(tmp_path)!r} + "/" + name)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
