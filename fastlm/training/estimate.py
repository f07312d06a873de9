"""What the parts of a run take on this machine, from a few steps of it: `fastlm train --dry-run`.

A model that fits into memory is measured as a whole. Of a larger one, models of one and two layers are: time and memory
are linear in the number of layers.
"""

import dataclasses
import itertools
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.models.base import PretrainedModel
from fastlm.models.layers import RECOMPUTE
from fastlm.training.average import Average
from fastlm.training.batches import evaluation_batches, training_batch
from fastlm.training.data import Corpus
from fastlm.training.models import objective_of
from fastlm.training.settings import WHOLE_LAYERS, Settings
from fastlm.training.trainer import Loss, Trainer

SECONDS = 4.0  # of the measurement of a part of a step
SHORT = 1.0  # seconds of the measurement of an evaluation, and of a copy
LONG = 15.0  # seconds of a first repetition that is not repeated
SPARE = 0.85  # fraction of the available memory that a measured model may take
# Bytes per parameter.
TRAINED = 4 * 4  # weight, gradient, two moments
AVERAGED = 4
STORED = 3 * 4  # weight and moments, in a checkpoint and in the copy that it is written from

Build = Callable[[Settings], PretrainedModel]


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of the parts of a run."""

    start: float  # of what the first step needs, the model itself excepted
    step: float
    evaluation: float  # of the losses of training and validation text
    copy: float  # of what a checkpoint is written from

    def extended(self, two: "Seconds", layers: int) -> "Seconds":
        """Those of a model with more layers; self, two: of one and of two layers."""
        ones, twos = dataclasses.astuple(self), dataclasses.astuple(two)
        return Seconds(*(linear(a, b, layers) for a, b in zip(ones, twos, strict=True)))


@dataclasses.dataclass(frozen=True)
class Estimate:
    parameters: int
    seconds: Seconds
    memory: int  # bytes at the peak
    available: int  # bytes
    stored: int  # bytes of a checkpoint
    measured: bool  # the whole model; otherwise one and two of its layers


def estimate(settings: Settings, corpus: Corpus, make: Build, device: torch.device) -> Estimate:
    """Measures parts of a run of a new model.

    Args:
        make: a model for settings that may have fewer layers.
    """
    with torch.device("meta"):
        parameters = make_on(make, settings, torch.device("meta")).num_parameters()
    available = available_memory(device)
    # What `needed` makes stays in the process in part, and would count as memory of the run.
    if settings.layers <= 2 or at_most(settings, parameters) <= available / 2:
        return estimate_of(settings, corpus, make(settings), device)
    memory = needed(settings, corpus, make, device, parameters)
    if memory <= SPARE * available:
        return estimate_of(settings, corpus, make(settings), device)
    one, two = (measure(few(settings, n), corpus, make(few(settings, n)).to(device))[0] for n in (1, 2))
    stored = parameters * stored_per_parameter(settings)
    return Estimate(parameters, one.extended(two, settings.layers), memory, available, stored, measured=False)


def estimate_of(
    settings: Settings, corpus: Corpus, model: Any, device: torch.device, loss: Loss | None = None
) -> Estimate:
    """Measures parts of a run of a model that is in memory. loss: as that of `measure`."""
    seconds, stored = measure(settings, corpus, model.to(device), loss)
    return Estimate(
        model.num_parameters(), seconds, peak_memory(device), available_memory(device), stored, measured=True
    )


def make_on(make: Build, settings: Settings, device: torch.device) -> PretrainedModel:
    with device:
        return make(settings)


def few(settings: Settings, layers: int) -> Settings:
    return dataclasses.replace(settings, layers=layers)


def linear(one: float, two: float, layers: int) -> float:
    """The value for a number of layers from those for one and two."""
    return one + (layers - 1) * max(0.0, two - one)


def at_most(settings: Settings, parameters: int) -> int:
    """A generous estimate of the bytes: a layer saves some 20 numbers for each channel of a token; this counts 100."""
    saved = 4 * 100 * settings.layers * settings.at_once * settings.context * settings.width
    return parameters * (TRAINED + AVERAGED + stored_per_parameter(settings)) + saved


def needed(settings: Settings, corpus: Corpus, make: Build, device: torch.device, parameters: int) -> int:
    """The memory at the peak: weights and what belongs to them, and what the forward pass saves."""
    if settings.recompute == WHOLE_LAYERS:  # of one layer at a time, and the input and the residual sum of each
        one = saved_bytes(dataclasses.replace(few(settings, 1), recompute=RECOMPUTE), corpus, make, device)
        two = one + 2 * settings.at_once * settings.context * settings.width * 4
    else:
        one, two = (saved_bytes(few(settings, n), corpus, make, device) for n in (1, 2))
    per_parameter = TRAINED + AVERAGED * bool(settings.ema)
    if device.type == "cpu":
        per_parameter += stored_per_parameter(settings)
    return int(memory_in_use(device) + parameters * per_parameter + linear(one, two, settings.layers))


def stored_per_parameter(settings: Settings) -> int:
    return STORED + AVERAGED * bool(settings.ema)


def batches(settings: Settings, corpus: Corpus, sequences: int) -> Iterator[tuple[Tensor, Tensor]]:
    objective, places = objective_of(settings, corpus.tokenizer), range(sequences)
    for step in itertools.count():
        yield training_batch(corpus.train, settings, objective, step, places)


def saved_bytes(settings: Settings, corpus: Corpus, make: Build, device: torch.device) -> int:
    """Bytes of the tensors that a forward pass saves for the backward pass, without parameters."""
    model = make(settings).to(device)
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


def measure(settings: Settings, corpus: Corpus, model: Any, loss: Loss | None = None) -> tuple[Seconds, int]:
    """(seconds, bytes of a checkpoint). loss: None: that of the objective."""
    began = time.perf_counter()
    objective = objective_of(settings, corpus.tokenizer)
    trainer = Trainer(model.train(), settings, loss or objective.loss)
    average = Average(trainer.parallel, settings.ema) if settings.ema else None
    pairs = [list(evaluation_batches(tokens, settings, objective)) for tokens in (corpus.train, corpus.validation)]
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [*trained, *trainer.state().values(), *(average.values if average else ())]
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda) for x in state]
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

    def evaluation() -> float:  # of a part
        return trainer.evaluate(pairs[0][:1])

    def copy() -> None:
        for x, value in zip(copies, state, strict=True):
            x.copy_(value.detach())

    copy()  # as the loop does
    start = time.perf_counter() - began
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
    parts = sum(len(inputs) for some in pairs for inputs, _ in some) / len(pairs[0][0][0])
    evaluating = parts * timed(evaluation, trainer.device, SHORT)
    copying = timed(copy, trainer.device, SHORT)
    return Seconds(start, seconds, evaluating, copying), sum(x.nbytes for x in copies)


def timed(call: Callable[[], Any], device: torch.device, total: float | None = None) -> float:
    """The median number of seconds of a call, without the first one, which allocates memory, unless that is long.

    total: seconds of all calls; None: SECONDS.
    """
    total = SECONDS if total is None else total

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
    while not times or sum(times) < total:
        times.append(seconds())
    return statistics.median(times)


def peak_memory(device: torch.device) -> int:
    """Of this process, in bytes; on a GPU, of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists() and (line := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(line[1]) * 1024  # ru_maxrss may be that of the process that started this one
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
