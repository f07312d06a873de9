"""A typed program that uses fastlm. mypy checks it with --strict (make lint); it is never run."""

from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import assert_type

import fastlm
from fastlm.generation import Tokenizer, load_tokenizer
from fastlm.models import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
)


def operators(x: Tensor, weight: Tensor, target: Tensor) -> None:
    assert_type(fastlm.attention(x, x, x, causal=True, window=(4, None), key_padding=None), Tensor)
    assert_type(fastlm.attention(x, x, x, return_lse=True), tuple[Tensor, Tensor])
    assert_type(fastlm.scaled_dot_product_attention(x, x, x, attn_mask=None, dropout_p=0.1, is_causal=True), Tensor)
    assert_type(fastlm.layernorm_residual(x, None, weight, eps=1e-5, dropout_p=0.1), tuple[Tensor, Tensor])
    assert_type(
        fastlm.gelu_mlp(x, weight, None, weight, None, approximate="tanh", layout="conv1d", recompute=1), Tensor
    )
    assert_type(fastlm.glu_mlp(x, weight, weight, weight, b_down=None, activation="gelu_tanh", recompute=0), Tensor)
    assert_type(fastlm.linear(x, weight, layout="conv1d", backend="torch"), Tensor)
    assert_type(fastlm.linear_cross_entropy(x, weight, target, reduction="sum", label_smoothing=0.1), Tensor)
    assert_type(fastlm.linear_log_prob(x, weight, target, temperature=0.7, softcap=30.0), tuple[Tensor, Tensor])
    with fastlm.use_backend("reference"):
        fastlm.linear(x, weight)


def encoders(model: torch.nn.Module, directory: Path) -> None:
    assert_type(fastlm.encode(model, ["a text"], pooling="cls", normalize=False, max_tokens_per_batch=512), Tensor)
    assert_type(fastlm.rerank(str(directory), "a query", iter(["a text"]), activation="identity"), Tensor)


def training(model: torch.nn.Module) -> None:
    optimizer = fastlm.optim.AdamW(
        model.parameters(), lr=1e-3, max_grad_norm=1.0, master_weights=True, zero_gradients=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    optimizer.step()
    schedule.step()
    assert_type(optimizer.grad_norm, Tensor | None)
    tuning = fastlm.tune_allocator()
    assert_type(tuning.tuned, bool)
    assert_type(tuning.reason, str)


def report() -> str:
    info = fastlm.info()
    assert_type(info.backends, dict[str, list[str]])
    assert_type(info.isa, str | None)
    return f"{fastlm.__version__} {info}"


def models(directory: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.bfloat16)
    assert_type(model, GPT2LMHeadModel)
    assert_type(model.generate(torch.zeros(1, 1, dtype=torch.int64), max_new_tokens=4, temperature=0.7), Tensor)
    model.gradient_checkpointing_enable()
    model.save_pretrained(str(directory))
    GPT2Model(GPT2Config(n_layer=2)), BertModel(BertConfig(num_hidden_layers=2))
    assert_type(BertForMaskedLM.from_pretrained(directory), BertForMaskedLM)
    assert_type(BertForSequenceClassification.from_pretrained(directory).num_parameters(), int)
    assert_type(load_tokenizer(directory), Tokenizer)
