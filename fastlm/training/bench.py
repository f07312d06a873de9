"""What `fastlm bench` and `fastlm profile` take training steps of: models of several sizes, and their baselines."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from fastlm.models.language_model import LanguageModel
from fastlm.training.baseline import PlainGPT2
from fastlm.training.baseline_bert import PlainBert
from fastlm.training.data.order import draws
from fastlm.training.objectives import MaskedToken, NextToken
from fastlm.training.settings import Settings
from fastlm.training.trainer import Trainer
from fastlm.training.whole import Loss


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and the batch that it takes a step on."""

    kind: str  # "GPT-2", "BERT"
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    context: int
    dropout: float = 0.0  # wherever the architecture has some

    def __str__(self) -> str:
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.kind}, {self.layers} layers of {self.width}, {self.batch} × {self.context} tokens{dropout}"

    def model(self, seed: int = 0) -> GPT2LMHeadModel | BertForMaskedLM:
        torch.manual_seed(seed)
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
        if self.kind == "GPT-2":
            return NextToken()
        return MaskedToken(vocabulary=self.vocabulary, mask_token=min(103, self.vocabulary - 1))

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
        products = 3 * 2 * (tokens * self.layers * 12 * self.width**2 + predicted * head)
        keys_per_query = (self.context + 1) / 2 if self.kind == "GPT-2" else self.context
        return products + 3.5 * self.layers * 2 * 2 * tokens * keys_per_query * self.width


MODELS = {
    "gpt2": Subject("GPT-2", 12, 768, 12, 50257, 2, 512),
    "gpt2-dropout": Subject("GPT-2", 12, 768, 12, 50257, 2, 512, 0.1),
    "bert": Subject("BERT", 12, 768, 12, 30522, 8, 128, 0.1),
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
    """The same weights in plain PyTorch; nothing of fastlm's model stays in memory."""
    kind = PlainGPT2 if subject.kind == "GPT-2" else PlainBert
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
    import transformers

    theirs: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_dict()))
    theirs.load_state_dict(model.state_dict(), strict=False)  # without the tied output projection
    theirs = theirs.to(model.dtype).eval()
    theirs.generation_config.eos_token_id = None

    def generate(tokens: Tensor, new_tokens: int) -> Tensor:
        mask = torch.ones_like(tokens)
        return theirs.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)

    return generate
