"""What a run takes on this machine, from a few steps of it: `fastlm train --dry-run`.

A model that fits into memory is measured as a whole. Of a larger one, models of one and two layers are: time and memory
are linear in the number of layers.
"""

import dataclasses
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.models.base import PretrainedModel
from fastlm.training.average import Average
from fastlm.training.batches import training_batch
from fastlm.training.data import Corpus
from fastlm.training.models import objective_of
from fastlm.training.settings import Settings
from fastlm.training.trainer import Loss, Trainer

SECONDS = 4.0  # of the measurement of a part of a step
LONG = 15.0  # seconds of a first repetition that is not repeated
SPARE = 0.85  # fraction of the available memory that a measured model may take
BYTES = 4 * 4 + 3 * 4  # per parameter: weight, gradient, two moments; the copy of which a checkpoint is written
AVERAGE_BYTES = 2 * 4  # the averaged weight, and its copy

Build = Callable[[Settings], PretrainedModel]


@dataclasses.dataclass(frozen=True)
class Estimate:
    parameters: int
    seconds: float  # per step
    memory: int  # bytes at the peak
    available: int  # bytes
    measured: bool  # the whole model; otherwise one and two of its layers


def estimate(settings: Settings, corpus: Corpus, make: Build, device: torch.device) -> Estimate:
    """Measures parts of a step of a new model.

    Args:
        make: a model for settings that may have fewer layers.
    """
    with torch.device("meta"):
        parameters = make_on(make, settings, torch.device("meta")).num_parameters()
    memory, available = needed(settings, corpus, make, device, parameters), available_memory(device)
    if settings.layers <= 2 or memory <= SPARE * available:
        seconds, peak = measure(settings, corpus, make(settings).to(device))
        return Estimate(parameters, seconds, peak, available, measured=True)
    one, two = (measure(few(settings, n), corpus, make(few(settings, n)).to(device))[0] for n in (1, 2))
    return Estimate(parameters, linear(one, two, settings.layers), memory, available, measured=False)


def estimate_of(settings: Settings, corpus: Corpus, model: Any, loss: Loss, device: torch.device) -> Estimate:
    """Measures parts of a step of a model that is in memory. loss: as that of a Trainer."""
    seconds, peak = measure(settings, corpus, model.to(device), loss)
    return Estimate(model.num_parameters(), seconds, peak, available_memory(device), measured=True)


def make_on(make: Build, settings: Settings, device: torch.device) -> PretrainedModel:
    with device:
        return make(settings)


def few(settings: Settings, layers: int) -> Settings:
    return dataclasses.replace(settings, layers=layers)


def linear(one: float, two: float, layers: int) -> float:
    """The value for a number of layers from those for one and two."""
    return one + (layers - 1) * max(0.0, two - one)


def needed(settings: Settings, corpus: Corpus, make: Build, device: torch.device, parameters: int) -> int:
    """The memory at the peak: weights and what belongs to them, and what the forward pass saves."""
    one, two = (saved_bytes(few(settings, n), corpus, make(few(settings, n)).to(device)) for n in (1, 2))
    per_parameter = BYTES + AVERAGE_BYTES * bool(settings.ema)
    return int(resident() + parameters * per_parameter + linear(one, two, settings.layers))


def batches(settings: Settings, corpus: Corpus, sequences: int) -> Iterator[tuple[Tensor, Tensor]]:
    objective, places = objective_of(settings, corpus.tokenizer), range(sequences)
    for step in itertools.count():
        yield training_batch(corpus.train, settings, objective, step, places)


def saved_bytes(settings: Settings, corpus: Corpus, model: PretrainedModel) -> int:
    """Bytes of the tensors that a forward pass saves for the backward pass, without parameters."""
    sizes: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    trainer = Trainer(model.train(), settings, objective_of(settings, corpus.tokenizer).loss)
    inputs, targets = trainer.to_device(*next(batches(settings, corpus, settings.at_once)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), trainer.autocast():
        loss = trainer.parallel.loss(inputs, targets)
        total = sum(sizes.values())
    del loss
    return total


def measure(settings: Settings, corpus: Corpus, model: Any, loss: Loss | None = None) -> tuple[float, int]:
    """(seconds of a step, bytes of memory at the peak). loss: None: that of the objective."""
    trainer = Trainer(model.train(), settings, loss or objective_of(settings, corpus.tokenizer).loss)
    average = Average(trainer.parallel, settings.ema) if settings.ema else None
    trained = [p for p in model.parameters() if p.requires_grad]
    copies = [x.detach().clone() for x in (*trained, *trainer.state().values())]  # of a checkpoint
    copies += [x.clone() for x in average.values] if average else []
    count, rest = divmod(settings.batch, settings.at_once)
    data, last = batches(settings, corpus, settings.at_once), batches(settings, corpus, rest)

    def micro_batch() -> Tensor:
        return trainer.accumulate(*next(data))

    def last_micro_batch() -> Tensor:  # of fewer sequences
        return trainer.accumulate(*next(last))

    def update() -> None:
        trainer.update(torch.zeros(()))
        if average is not None:
            average.update()

    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0  # so that the weights stay finite
    if settings.batch == settings.at_once:  # as the loop runs it

        def step() -> None:
            trainer.step(*next(data), lr=0.0)
            if average is not None:
                average.update()

        seconds = timed(step, trainer.device)
    else:
        seconds = count * timed(micro_batch, trainer.device) + timed(update, trainer.device)
        if rest:
            seconds += timed(last_micro_batch, trainer.device)
    del copies
    return seconds, peak_memory(trainer.device)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """The median number of seconds of a call, without the first one, which allocates memory, unless that is long."""

    def seconds() -> float:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    first = seconds()
    if first > LONG:
        return first
    times: list[float] = []
    while not times or sum(times) < SECONDS:
        times.append(seconds())
    return statistics.median(times)


def peak_memory(device: torch.device) -> int:
    """Of this process, in bytes; on a GPU, of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process has now; on a GPU, its tensors."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()


def resident() -> int:
    """Bytes of memory that this process has now; 0 where the system does not tell."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.exists() else 0


def available_memory(device: torch.device) -> int:
    """Bytes that this process has or could get."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    file = Path("/proc/meminfo")
    if file.exists():
        fields = dict(line.split(":", 1) for line in file.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024 + resident()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
