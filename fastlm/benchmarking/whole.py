"""Training steps and generation: fastlm's models and plain PyTorch ones with the same weights.

The models are those of fastlm/training/bench.py and fastlm/models/bench.py.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import nn

import fastlm
from fastlm.benchmarking.compare import DTYPES, Row, baselines_of
from fastlm.benchmarking.machine import Probe, arithmetic, best, peak, reading, threads
from fastlm.benchmarking.measure import Timer, interleaved, timed
from fastlm.benchmarking.memory import resident_growth
from fastlm.benchmarking.operators import backends_of
from fastlm.benchmarking.worker import Worker
from fastlm.models.bench import bytes_per_token, generator
from fastlm.models.layers import RECOMPUTE
from fastlm.training import bench
from fastlm.training.bench import MODELS, Subject

PROMPT, NEW_TOKENS = 64, 64

Work = tuple[Timer, Callable[[], int | None]]  # of a worker process: a timer, and its peak memory use


# 1. In a worker process


def set_up(number_of_threads: int, tuned: bool) -> None:
    """The process, before it creates a model."""
    torch.set_num_threads(number_of_threads)
    if tuned:
        fastlm.tune_allocator()


def step_timer(
    *,
    library: str,
    dtype: str,
    number_of_threads: int,
    subject: dict[str, Any],
    tuned: bool,
    compiled: bool = False,
    recompute: int = RECOMPUTE,
) -> Work:
    """A training step with clipping and AdamW; the memory counts beyond model and optimizer state."""
    set_up(number_of_threads, tuned)
    about = Subject(**subject)
    model, loss = bench.plain_model(about) if library != "fastlm" else bench.fastlm_model(about, recompute)
    if compiled:
        model = cast(nn.Module, torch.compile(model))
    trainer = bench.trainer_of(about, model, loss, dtype, native=library != "fastlm")
    inputs, targets = about.pairs()
    # PyTorch creates AdamW's moments in the first step.
    growth = resident_growth(sum(2 * 4 * p.numel() for p in trainer.parameters if p not in trainer.optimizer.state))
    return timed(lambda: trainer.step(inputs, targets, 1e-4)), growth


# 2. Comparing


def machine_timer(number_of_threads: int, dtypes: Iterable[torch.dtype]) -> tuple[Probe, Timer]:
    """The arithmetic of the faster of the dtypes.

    It waits before and after, because the threads of each process keep spinning for some milliseconds.
    """
    probe = arithmetic(number_of_threads, max(dtypes, key=lambda dtype: peak(number_of_threads, dtype)))

    def timer(n: int = 1) -> float:
        time.sleep(0.1)
        seconds = best(probe.call)
        time.sleep(0.1)
        return seconds

    return probe, timer


def compare_processes(
    function: str,
    arguments: dict[str, Any],
    *,
    compiled: bool,
    rounds: int,
    budget: float,
    machine: Timer | None = None,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """fastlm with its allocator tuned, and PyTorch with default and with tuned settings, each in a worker process.

    Args:
        function, arguments: as for Worker; it also gets library, tuned and, if true, compiled.
        machine: timed in the same rounds.

    Returns:
        (arguments of a Row, the seconds of each).
    """
    own: dict[str, dict[str, Any]] = {
        "fastlm": {"library": "fastlm", "tuned": True},
        "eager": {"library": "torch", "tuned": False},
        "eager tuned": {"library": "torch", "tuned": True},
    }
    if compiled:
        own["compiled"] = {"library": "torch", "tuned": False, "compiled": True}
        own["compiled tuned"] = {"library": "torch", "tuned": True, "compiled": True}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(function, arguments | each)) for name, each in own.items()}
        seconds = interleaved({**workers, **({"machine": machine} if machine else {})}, rounds, budget=budget)
        last = {name: worker.ask() for name, worker in workers.items()}
    return {
        "dtype": arguments["dtype"],
        "threads": arguments["number_of_threads"],
        "backend": ", ".join(last["fastlm"]["backends"]),
        "seconds": statistics.median(seconds["fastlm"]),
        "baselines": baselines_of(seconds, {name: answer["bytes"] for name, answer in last.items()}, but=["machine"]),
        "bytes_held": last["fastlm"]["bytes"],
    }, seconds


def compare_steps(
    dtype: str,
    number_of_threads: int,
    *,
    subject: Subject = MODELS["gpt2"],
    recompute: int = RECOMPUTE,
    compiled: bool = False,
    rounds: int = 10,
    budget: float = 60.0,
) -> Row:
    """A training step. recompute: fastlm's level."""
    arguments = {
        "dtype": dtype,
        "number_of_threads": number_of_threads,
        "subject": dataclasses.asdict(subject),
        "recompute": recompute,
    }
    # bfloat16 is a storage type: the faster arithmetic of the two is its limit.
    probe, machine = machine_timer(number_of_threads, {torch.float32, DTYPES[dtype]})
    found, seconds = compare_processes(
        "whole.step_timer", arguments, compiled=compiled, rounds=rounds, budget=budget, machine=machine
    )
    return Row(
        "training_step",
        str(subject),
        direction="step",
        share=probe.share(subject.flops(), seconds["fastlm"], seconds["machine"]),
        bound="arithmetic",
        tokens=subject.batch * subject.context,
        recompute=recompute,
        **found,
    )


def compare_growth(point: str, dtype: str, number_of_threads: int, **options: Any) -> Row:
    """A training step at one of the POINTS, with the options of compare_steps."""
    row = compare_steps(dtype, number_of_threads, subject=bench.POINTS[point], **options)
    return dataclasses.replace(row, operator="growth", shape=bench.SHAPES[bench.series_of(point)], direction=point)


def compare_generation(
    name: str,
    dtype: str,
    number_of_threads: int,
    *,
    sizes: dict[str, Any] | None = None,
    prompt: int = PROMPT,
    new_tokens: int = NEW_TOKENS,
    rounds: int = 10,
    budget: float = 30.0,
) -> Row:
    """Greedy decoding of one sequence by one of GENERATORS; both sides have a KV cache.

    The share of the machine's peak counts the weights that the new tokens read, and all of the time.
    """
    model = generator(name, DTYPES[dtype], sizes)
    plain = bench.baseline_generate(name, model)
    config = model.config
    tokens = torch.randint(config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))

    def ours() -> None:
        model.generate(tokens, max_new_tokens=new_tokens, eos_token_id=())

    with threads(number_of_threads), torch.no_grad():
        backend = backends_of(ours)
        probe = reading()
        timers = {
            "fastlm": timed(ours),
            "eager": timed(lambda: plain(tokens, new_tokens)),
            "machine": lambda n=1: best(probe.call),  # undisturbed, as the threads of the others spin
        }
        seconds = interleaved(timers, rounds, budget=budget)
    kind = {"gpt2": "GPT-2", "smollm2": "SmolLM 2"}[name]
    return Row(
        "generation",
        f"{kind}, {config.num_hidden_layers} layers of {config.hidden_size}, {prompt} tokens + {new_tokens}",
        dtype,
        number_of_threads,
        "greedy",
        backend,
        statistics.median(seconds["fastlm"]),
        baselines_of(seconds, {}, but=["machine"]),
        share=probe.share(new_tokens * bytes_per_token(model), seconds["fastlm"], seconds["machine"]),
        bound="memory",
        tokens=new_tokens,
    )
