"""What `fastlm bench` and `fastlm profile` take training steps of: models of several sizes, and their baselines."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.models import BertConfig, BertForMaskedLM, CausalLM, GPT2Config, GPT2LMHeadModel
from fastlm.models.bench import GENERATORS
from fastlm.models.decoder_config import LlamaConfig
from fastlm.models.language_model import LanguageModel
from fastlm.training.baseline import PlainGPT2
from fastlm.training.baseline_bert import PlainBert
from fastlm.training.baseline_llama import PlainLlama
from fastlm.training.data.order import draws
from fastlm.training.objectives import MaskedToken, NextToken
from fastlm.training.settings import Settings
from fastlm.training.trainer import Trainer
from fastlm.training.whole import Loss


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and the batch that it takes a step on."""

    kind: str  # one of BASELINES
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    context: int
    dropout: float = 0.0  # wherever the architecture has some
    kv_heads: int | None = None  # of a Llama
    hidden: int | None = None  # width of the MLP; None: four times the width

    def __str__(self) -> str:
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.kind}, {self.layers} layers of {self.width}, {self.batch} × {self.context} tokens{dropout}"

    def model(self, seed: int = 0) -> LanguageModel | BertForMaskedLM:
        torch.manual_seed(seed)
        if self.kind == "Llama":
            return CausalLM(
                LlamaConfig(
                    num_hidden_layers=self.layers,
                    hidden_size=self.width,
                    num_attention_heads=self.heads,
                    num_key_value_heads=self.kv_heads or self.heads,
                    intermediate_size=self.hidden or 4 * self.width,
                    vocab_size=self.vocabulary,
                    max_position_embeddings=self.context,
                    tie_word_embeddings=True,
                )
            )
        if self.kind == "GPT-2":
            return GPT2LMHeadModel(
                GPT2Config(
                    n_layer=self.layers,
                    n_embd=self.width,
                    n_head=self.heads,
                    vocab_size=self.vocabulary,
                    n_positions=self.context,
                    resid_pdrop=self.dropout,
                    embd_pdrop=self.dropout,
                    attn_pdrop=self.dropout,
                )
            )
        return BertForMaskedLM(
            BertConfig(
                num_hidden_layers=self.layers,
                hidden_size=self.width,
                num_attention_heads=self.heads,
                intermediate_size=4 * self.width,
                vocab_size=self.vocabulary,
                max_position_embeddings=self.context,
                hidden_dropout_prob=self.dropout,
                attention_probs_dropout_prob=self.dropout,
            )
        )

    def objective(self) -> NextToken | MaskedToken:
        if self.kind == "BERT":
            return MaskedToken(vocabulary=self.vocabulary, mask_token=min(103, self.vocabulary - 1))
        return NextToken()

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets)."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocabulary, (self.batch, self.context + 1), generator=generator)
        return self.objective().pairs(tokens, draws(0, 0, range(self.batch), self.context))

    def flops(self) -> float:
        """The least that a step takes.

        A multiply-add per weight and token, of the output projection per predicted token, twice that in backward; the
        two products of attention, in backward two for each and the scores again. Embedding lookups are not counted.
        """
        tokens, predicted = self.batch * self.context, int((self.pairs()[1] >= 0).sum())
        head = self.vocabulary * self.width + (self.width**2 if self.kind == "BERT" else 0)
        key_width = self.width // self.heads * (self.kv_heads or self.heads)
        hidden = (self.hidden or 4 * self.width) * (3 if self.kind == "Llama" else 2)
        layer = self.width * (2 * self.width + 2 * key_width + hidden)
        products = 3 * 2 * (tokens * self.layers * layer + predicted * head)
        keys_per_query = self.context if self.kind == "BERT" else (self.context + 1) / 2
        return products + 3.5 * self.layers * 2 * 2 * tokens * keys_per_query * self.width


BASELINES: dict[str, Any] = {"GPT-2": PlainGPT2, "BERT": PlainBert, "Llama": PlainLlama}
SMOLLM2 = GENERATORS["smollm2"]
MODELS = {
    "gpt2": Subject("GPT-2", 12, 768, 12, 50257, 2, 512),
    "gpt2-dropout": Subject("GPT-2", 12, 768, 12, 50257, 2, 512, 0.1),
    "bert": Subject("BERT", 12, 768, 12, 30522, 8, 128, 0.1),
    "smollm2": Subject(
        "Llama",
        SMOLLM2["num_hidden_layers"],
        SMOLLM2["hidden_size"],
        SMOLLM2["num_attention_heads"],
        SMOLLM2["vocab_size"],
        2,
        512,
        kv_heads=SMOLLM2["num_key_value_heads"],
        hidden=SMOLLM2["intermediate_size"],
    ),
    "small": Subject("GPT-2", 6, 384, 6, 256, 12, 256),  # nanoGPT's sizes for one GPU, on bytes
    "tiny": Subject("GPT-2", 4, 128, 4, 256, 12, 64),  # and for a CPU
}

# Models that grow. A size from which on every token costs much more than its arithmetic would show as a step in the
# curve of time per token. By series and size; along a series the number of tokens per step and the size of a head are
# constant.
SERIES: dict[str, dict[int, Subject]] = {
    "context": {
        size: Subject("GPT-2", 2, 256, 4, 256, 4096 // size, size) for size in (128, 256, 512, 1024, 2048, 4096)
    },
    "width": {
        size: Subject("GPT-2", 2, size, size // 64, 4096, 2, 128) for size in (256, 384, 512, 768, 1024, 1536, 2048)
    },
}
POINTS = {f"{series} {size}": subject for series, sizes in SERIES.items() for size, subject in sizes.items()}
SHAPES = {
    "context": "GPT-2, 2 layers of 256, 4096 tokens per step",
    "width": "GPT-2, 2 layers, heads of 64, vocabulary 4096, 2 × 128 tokens",
}


def series_of(point: str) -> str:
    return point.split()[0]


def size_of(point: str) -> int:
    return int(point.split()[1])


def fastlm_model(subject: Subject, recompute: int) -> tuple[nn.Module, Loss]:
    model = subject.model()
    model.recompute = recompute
    return model, subject.objective().loss


def plain_model(subject: Subject) -> tuple[nn.Module, Loss]:
    """The same weights in plain PyTorch, or transformers' Llama; nothing of fastlm's model stays in memory."""
    kind = BASELINES[subject.kind]
    return kind.like(subject.model()), kind.loss


def trainer_of(subject: Subject, model: nn.Module, loss: Loss, dtype: str, native: bool = False) -> Trainer:
    settings = Settings(
        batch=subject.batch, context=subject.context, dtype=dtype, width=subject.width, heads=subject.heads
    )
    return Trainer(model, settings, loss, native=native)


def baseline_generate(name: str, model: LanguageModel) -> Callable[[Tensor, int], Tensor]:
    """Greedy decoding with the same weights: plain PyTorch for GPT-2, transformers for SmolLM 2."""
    if name == "gpt2":
        return PlainGPT2.like(model).to(model.dtype).eval().generate
    assert isinstance(model, CausalLM)
    theirs: Any = PlainLlama.like(model).eval()
    theirs.generation_config.eos_token_id = None

    def generate(tokens: Tensor, new_tokens: int) -> Tensor:
        mask = torch.ones_like(tokens)
        return theirs.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)

    return generate
