"""The model and the objective for settings and a tokenizer: a new model, or one to start from."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fastlm.core.errors import mismatch
from fastlm.models import (
    BertConfig,
    BertForMaskedLM,
    CausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    load_model,
)
from fastlm.models.encoder import EncoderForMaskedLM
from fastlm.models.language_model import LanguageModel
from fastlm.training.objectives import MaskedToken, NextToken
from fastlm.training.settings import WHOLE_LAYERS, Settings
from fastlm.training.tokenizers import (
    MASKS,
    PADS,
    id_of,
    special_ids,
    vocabulary_size,
    word_table,
)

# They are those of the model where there is one to start from.
MODEL_SETTINGS = ("architecture", "layers", "heads", "kv_heads", "width", "mlp_width", "dropout")


def objective_of(settings: Settings, tokenizer: Tokenizer) -> NextToken | MaskedToken:
    if settings.objective == "next-token":
        return NextToken()
    mask = id_of(tokenizer, MASKS)
    if mask is None:
        raise mismatch("tokenizer", f"a tokenizer with {' or '.join(MASKS)} for masked-token training", "one without")
    words = word_table(tokenizer) if settings.whole_words else None
    return MaskedToken(vocabulary_size(tokenizer), mask, special_ids(tokenizer), words)


def load(directory: Path, settings: Settings, tokenizer: Tokenizer) -> LanguageModel | EncoderForMaskedLM:
    """The model in a directory, in float32, to be trained further on the CPU.

    Raises:
        ValueError: a setting does not fit it; the message names it.
    """
    for name in MODEL_SETTINGS[: -1 if settings.lora else None]:  # dropout is of the adapters
        if (given := getattr(settings, name)) != getattr(Settings(), name):
            raise mismatch(name, "no value with a model to start from, which has its own", given)
    model = load_model(directory, dtype=torch.float32)
    if not isinstance(model, LanguageModel | EncoderForMaskedLM):
        expected = "a model that predicts the next or a masked token"
        raise mismatch("init", expected, f"a {type(model).__name__} in {directory}")
    causal = isinstance(model, LanguageModel)
    if causal != (settings.objective == "next-token"):
        expected = f"{'next' if causal else 'masked'}-token for the {type(model).__name__} in {directory}"
        raise mismatch("objective", expected, repr(settings.objective))
    context = model.config.max_position_embeddings if causal else model.config.context
    if settings.context > context:
        raise mismatch("context", f"at most {context}, the context of the model in {directory}", settings.context)
    if (size := vocabulary_size(tokenizer)) > model.config.vocab_size:
        expected = f"a tokenizer of at most {model.config.vocab_size} tokens, the model's vocabulary"
        raise mismatch("init", expected, f"{size} in {directory}")
    set_recompute(model, settings.recompute)
    return model


def build(
    settings: Settings, tokenizer: Tokenizer, *, end_of_text: int | None = None
) -> GPT2LMHeadModel | BertForMaskedLM | CausalLM:
    """A GPT-2 or a Llama for next-token training or a BERT for masked-token training, on the CPU.

    Initial weights depend on settings.seed only, so they are the same on every device.

    Args:
        end_of_text: the id after which a GPT-2 or a Llama generates no more, if there is one.
    """
    architecture = settings.architecture or ("gpt2" if settings.objective == "next-token" else "bert")
    model: GPT2LMHeadModel | BertForMaskedLM | CausalLM = BUILDERS[architecture](settings, tokenizer, end_of_text)
    set_recompute(model, settings.recompute)
    return model


def set_recompute(model: Any, level: int) -> None:
    """level: settings.recompute."""
    if level == WHOLE_LAYERS:
        model.gradient_checkpointing_enable()
    else:
        model.recompute = level


def build_gpt2(settings: Settings, tokenizer: Tokenizer, end_of_text: int | None = None) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocabulary_size(tokenizer),
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        n_inner=settings.mlp_width,
        resid_pdrop=settings.dropout,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        bos_token_id=None,
        eos_token_id=end_of_text,
    )
    with seeded(settings.seed):
        return GPT2LMHeadModel(config)


def build_bert(settings: Settings, tokenizer: Tokenizer, end_of_text: int | None = None) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=vocabulary_size(tokenizer),
        max_position_embeddings=settings.context,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.mlp_width or 4 * settings.width,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        pad_token_id=id_of(tokenizer, PADS),
    )
    with seeded(settings.seed):
        return BertForMaskedLM(config)


def build_llama(settings: Settings, tokenizer: Tokenizer, end_of_text: int | None = None) -> CausalLM:
    """With tied embeddings, as small models have them. The MLP is wide in multiples of 64 if its width is not given."""
    config = LlamaConfig(
        vocab_size=vocabulary_size(tokenizer),
        max_position_embeddings=settings.context,
        hidden_size=settings.width,
        intermediate_size=settings.mlp_width or 64 * round(8 / 3 * settings.width / 64 + 0.5),
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        attention_dropout=settings.dropout,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_text,
    )
    with seeded(settings.seed):
        return CausalLM(config)


BUILDERS: dict[str, Callable[[Settings, Tokenizer, int | None], Any]] = {
    "gpt2": build_gpt2,
    "llama": build_llama,
    "bert": build_bert,
}


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds PyTorch's default generator; restores its state on exit."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        yield
