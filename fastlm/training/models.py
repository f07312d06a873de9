"""Builds the model and the objective for settings and a tokenizer."""

import contextlib
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer

from fastlm.core.errors import mismatch
from fastlm.models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from fastlm.training.objectives import MaskedToken, NextToken
from fastlm.training.settings import Settings
from fastlm.training.tokenizers import MASK, PAD


def objective_of(settings: Settings, tokenizer: Tokenizer) -> NextToken | MaskedToken:
    if settings.objective == "next-token":
        return NextToken()
    pad, mask = tokenizer.token_to_id(PAD), tokenizer.token_to_id(MASK)
    if pad is None or mask is None:
        raise mismatch("tokenizer", f"a tokenizer with {PAD} and {MASK} for masked-token training", "one without")
    return MaskedToken(
        vocabulary=pad, mask_token=mask
    )  # special tokens have the last ids, and pad is the first of them


def build(settings: Settings, tokenizer: Tokenizer) -> GPT2LMHeadModel | BertForMaskedLM:
    """A GPT-2 for next-token training or a BERT for masked-token training, on the CPU.

    Initial weights depend on settings.seed only, so they are the same on every device.
    """
    model = (build_gpt2 if settings.objective == "next-token" else build_bert)(settings, tokenizer)
    model.recompute = settings.recompute
    return model


def build_gpt2(settings: Settings, tokenizer: Tokenizer) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        resid_pdrop=settings.dropout,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    with seeded(settings.seed):
        return GPT2LMHeadModel(config)


def build_bert(settings: Settings, tokenizer: Tokenizer) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=settings.context,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.width,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    with seeded(settings.seed):
        return BertForMaskedLM(config)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds PyTorch's default generator; restores its state on exit."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield
