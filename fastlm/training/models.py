"""The model and the objective that settings and a tokenizer ask for."""

import torch
from tokenizers import Tokenizer
from torch import nn

from fastlm.models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from fastlm.training.objectives import MaskedToken, NextToken
from fastlm.training.settings import Settings
from fastlm.training.tokenizers import MASK, PAD


def objective_of(settings: Settings, tokenizer: Tokenizer) -> NextToken | MaskedToken:
    if settings.objective == "next-token":
        return NextToken()
    # replacements are drawn from the ordinary tokens alone: the special ones have the last ids
    return MaskedToken(vocabulary=tokenizer.token_to_id(PAD), mask_token=tokenizer.token_to_id(MASK))


def build(settings: Settings, tokenizer: Tokenizer) -> nn.Module:
    """A GPT-2 for next tokens, a BERT for masked tokens; initial weights by the seed."""
    vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(settings.seed)
        if settings.objective == "next-token":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=vocabulary, n_positions=settings.context, n_embd=settings.width, n_layer=settings.layers, n_head=settings.heads,
                    resid_pdrop=settings.dropout, embd_pdrop=settings.dropout, attn_pdrop=settings.dropout, bos_token_id=None, eos_token_id=None,
                )
            )  # fmt: skip
        return BertForMaskedLM(
            BertConfig(
                vocab_size=vocabulary, max_position_embeddings=settings.context, hidden_size=settings.width, num_hidden_layers=settings.layers,
                num_attention_heads=settings.heads, intermediate_size=4 * settings.width, hidden_dropout_prob=settings.dropout,
                attention_probs_dropout_prob=settings.dropout, pad_token_id=tokenizer.token_to_id(PAD),
            )
        )  # fmt: skip
