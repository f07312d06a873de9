"""The model and the objective for settings and a tokenizer: a new model, or one to start from."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from fastlm.core.errors import mismatch
from fastlm.models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, load_model
from fastlm.models.language_model import LanguageModel
from fastlm.training.objectives import MaskedToken, NextToken
from fastlm.training.settings import Settings
from fastlm.training.tokenizers import (
    MASK,
    MASKS,
    PAD,
    PADS,
    id_of,
    special_ids,
    vocabulary_size,
    word_table,
)


def objective_of(settings: Settings, tokenizer: Tokenizer) -> NextToken | MaskedToken:
    if settings.objective == "next-token":
        return NextToken()
    pad, mask = id_of(tokenizer, PADS), id_of(tokenizer, MASKS)
    if pad is None or mask is None:
        raise mismatch("tokenizer", f"a tokenizer with {PAD} and {MASK} for masked-token training", "one without")
    words = word_table(tokenizer) if settings.whole_words else None
    return MaskedToken(vocabulary_size(tokenizer), mask, special_ids(tokenizer), words)


def load(directory: Path, settings: Settings, tokenizer: Tokenizer) -> LanguageModel:
    """The language model in a directory, in float32, to be trained further on the CPU.

    Raises:
        ValueError: a setting does not fit it; the message names it.
    """
    if settings.objective != "next-token":
        raise mismatch("objective", "next-token with a model to start from", repr(settings.objective))
    for name in ("layers", "heads", "width", "dropout"):
        if (given := getattr(settings, name)) != getattr(Settings(), name):
            raise mismatch(name, "no value with a model to start from, which has its own", given)
    model = load_model(directory, dtype=torch.float32)
    if not isinstance(model, LanguageModel):
        raise mismatch("init", "a model that predicts the next token", f"a {type(model).__name__} in {directory}")
    if settings.context > model.config.max_position_embeddings:
        expected = f"at most {model.config.max_position_embeddings}, the context of the model in {directory}"
        raise mismatch("context", expected, settings.context)
    if (size := vocabulary_size(tokenizer)) > model.config.vocab_size:
        expected = f"a tokenizer of at most {model.config.vocab_size} tokens, the model's vocabulary"
        raise mismatch("init", expected, f"{size} in {directory}")
    model.recompute = settings.recompute
    return model


def build(
    settings: Settings, tokenizer: Tokenizer, *, end_of_text: int | None = None
) -> GPT2LMHeadModel | BertForMaskedLM:
    """A GPT-2 for next-token training or a BERT for masked-token training, on the CPU.

    Initial weights depend on settings.seed only, so they are the same on every device.

    Args:
        end_of_text: the id after which GPT-2 generates no more, if there is one.
    """
    model: GPT2LMHeadModel | BertForMaskedLM
    if settings.objective == "next-token":
        model = build_gpt2(settings, tokenizer, end_of_text)
    else:
        model = build_bert(settings, tokenizer)
    model.recompute = settings.recompute
    return model


def build_gpt2(settings: Settings, tokenizer: Tokenizer, end_of_text: int | None = None) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocabulary_size(tokenizer),
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        resid_pdrop=settings.dropout,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        bos_token_id=None,
        eos_token_id=end_of_text,
    )
    with seeded(settings.seed):
        return GPT2LMHeadModel(config)


def build_bert(settings: Settings, tokenizer: Tokenizer) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=vocabulary_size(tokenizer),
        max_position_embeddings=settings.context,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.width,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        pad_token_id=id_of(tokenizer, PADS),
    )
    with seeded(settings.seed):
        return BertForMaskedLM(config)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds PyTorch's default generator; restores its state on exit."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield
