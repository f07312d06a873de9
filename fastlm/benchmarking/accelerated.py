"""transformers models with and without fastlm.accelerate: the cases of fastlm/integrations/bench.py."""

import copy
import math
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlm
from fastlm.benchmarking import accuracy
from fastlm.benchmarking.compare import DTYPES, Row
from fastlm.benchmarking.machine import threads
from fastlm.benchmarking.measure import timed
from fastlm.benchmarking.memory import resident_growth
from fastlm.benchmarking.whole import Work, compare_processes, set_up
from fastlm.integrations.bench import CASES, Batch, sizes_of, transformers
from fastlm.integrations.sentence_transformers import ContrastiveLoss

TEMPERATURE = 0.05  # of the contrastive loss

# 1. In a worker process


def work(
    *,
    library: str,
    dtype: str,
    number_of_threads: int,
    case: str,
    sizes: dict[str, Any],
    tuned: bool,
    compiled: bool = False,
) -> Work:
    """One of CASES, as this process runs it."""
    set_up(number_of_threads, tuned)
    model, batches = CASES[case].make(**sizes)
    if CASES[case].work == "encoding":
        model = model.to(DTYPES[dtype])
        if compiled:
            torch._inductor.config.freezing = True  # the weights are packed once
    if library == "fastlm":
        fastlm.accelerate(model)
    if CASES[case].work == "trainer":
        return trainer_step(model, batches[0], dtype, compiled)
    ready: Any = torch.compile(model) if compiled else model
    if CASES[case].work == "encoding":
        return encoding(ready, batches)
    return training_step(model, loss_function(case, ready, batches, library), dtype)


def encoding(model: nn.Module, batches: Sequence[Batch]) -> Work:
    """All batches, in the dtype of the model throughout."""
    growth = resident_growth(0)

    @torch.no_grad()  # freezing does not support inference mode
    def encode() -> None:
        for batch in batches:
            embeddings(model, batch)

    return timed(encode), growth


def embeddings(model: nn.Module, batch: Batch) -> Tensor:
    """One unit vector per sentence, the mean over its tokens, as sentence-transformers computes it for MiniLM."""
    mask = batch["attention_mask"][..., None]
    hidden = model(**batch).last_hidden_state
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def loss_function(case: str, model: Any, batches: Sequence[Batch], library: str) -> Callable[[], Tensor]:
    """The loss of a step. library: "fastlm" for its contrastive loss."""
    if CASES[case].work != "contrastive":
        return lambda: model(**batches[0]).loss
    if library == "fastlm":
        number, rows = CASES[case].mini_batches, len(batches[0]["input_ids"])
        size = None if number == 1 else math.ceil(rows / number)
        loss = ContrastiveLoss(Embedding(model), TEMPERATURE, mini_batch_size=size)
        return lambda: loss(batches)
    return lambda: in_batch_loss(*(embeddings(model, batch) for batch in batches))


class Embedding(nn.Module):
    """A model as sentence-transformers calls it, followed by the pooling."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Batch) -> dict[str, Tensor]:
        return {"sentence_embedding": embeddings(self.model, features)}


def in_batch_loss(queries: Tensor, passages: Tensor) -> Tensor:
    """InfoNCE of unit vectors; row i of the passages belongs to row i of the queries."""
    return F.cross_entropy(queries @ passages.T / TEMPERATURE, torch.arange(len(queries)))


def training_step(model: nn.Module, loss_of_step: Callable[[], Tensor], dtype: str) -> Work:
    """Forward, backward and PyTorch's fused AdamW; bfloat16 is autocast."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    growth = resident_growth(sum(2 * p.nbytes for p in trained))  # the first step creates the moments

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of_step()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step), growth


def trainer_step(model: nn.Module, batch: Batch, dtype: str, compiled: bool) -> Work:
    """A step of transformers' Trainer with its defaults, data loader to AdamW; bfloat16 is autocast."""
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


# 2. Accuracy


def relative_error(case: str, dtype: str, number_of_threads: int, sizes: Mapping[str, Any]) -> float:
    """The error of the accelerated model against float64, relative to that of the original model.

    It is the error of the embeddings, or of the loss and all gradients of a step without dropout, on a small batch.
    """
    with threads(number_of_threads):
        true, original, ours = (encoded if CASES[case].work == "encoding" else stepped)(case, dtype, sizes)
    return accuracy.relative_to_baseline(*([found[name] for name in true] for found in (true, original, ours)))


def encoded(case: str, dtype: str, sizes: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    model, batches = CASES[case].make(**{**sizes, **CASES[case].small})
    model = model.to(DTYPES[dtype])
    with torch.no_grad():
        for ready in (copy.deepcopy(model).double(), model, fastlm.accelerate(copy.deepcopy(model))):
            yield {"embeddings": embeddings(ready, batches[0])}


def stepped(case: str, dtype: str, sizes: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    model, batches = CASES[case].make(**{**sizes, **CASES[case].small})
    predicts_tokens = "labels" in batches[0] and batches[0]["labels"].dim() == 2
    for kind in ("true", "original", "ours"):
        ready = copy.deepcopy(model)
        if kind == "true":
            ready.double()
            with accuracy.KeepFloat64():
                of_step = loss_function(case, ready, batches, "torch")
                loss = next_token_loss(ready, batches[0]) if predicts_tokens else of_step()
                loss.backward()
        else:
            if kind == "ours":
                fastlm.accelerate(ready)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = loss_function(case, ready, batches, "fastlm" if kind == "ours" else "torch")()
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


# 3. Comparing


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
    sizes = {**sizes_of(case, checkpoint), **(sizes or {})}
    shape, tokens = CASES[case].described(**sizes)
    error = accuracy.checked(relative_error(case, dtype, number_of_threads, sizes), f"{case} in {dtype}")
    arguments = {"dtype": dtype, "number_of_threads": number_of_threads, "case": case, "sizes": sizes}
    found, _ = compare_processes("accelerated.work", arguments, compiled=compiled, rounds=rounds, budget=budget)
    direction = "encode" if CASES[case].work == "encoding" else "step"
    return Row(f"accelerated_{case}", shape, direction=direction, tokens=tokens, error=error, **found)
