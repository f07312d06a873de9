"""Whole training steps and whole generations of GPT-2 small: fastlm's model and the plain PyTorch one, same weights, same tokens."""

import statistics
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import nn

from fastlm.benchmarking.actor import TUNED, Actor
from fastlm.benchmarking.compare import DTYPES, Rival, Row, served_by
from fastlm.benchmarking.machine import threads
from fastlm.benchmarking.measure import Ratio, Timer, in_turn, timed
from fastlm.models import GPT2Config, GPT2LMHeadModel
from fastlm.training.baseline import PlainGPT2
from fastlm.training.loop import Trainer
from fastlm.training.objectives import NextToken
from fastlm.training.settings import Settings

SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
BATCH, CONTEXT = 1, 1024
PROMPT, NEW_TOKENS = 64, 64


def model_of(sizes: dict[str, Any], seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def step_timer(*, library: str, dtype: str, number_of_threads: int, sizes: dict[str, Any], batch: int, context: int, compiled: bool = False) -> Timer:
    """In an actor: one training step as the trainer takes it, with clipping and AdamW."""
    torch.set_num_threads(number_of_threads)
    model = model_of(sizes)
    settings = Settings(batch=batch, context=context, dtype=dtype, width=sizes["n_embd"], heads=sizes["n_head"])
    if library == "fastlm":
        trainer = Trainer(model, settings, NextToken().loss)
    else:
        plain = PlainGPT2.like(model)
        trainer = Trainer(cast(nn.Module, torch.compile(plain)) if compiled else plain, settings, PlainGPT2.loss)
    del model
    tokens = torch.randint(sizes["vocab_size"], (batch, context + 1), generator=torch.Generator().manual_seed(0))
    return timed(lambda: trainer.step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 1e-4))


def compare_steps(
    dtype: str, number_of_threads: int, *, sizes: dict[str, int] | None = None, batch: int = BATCH, context: int = CONTEXT, compiled: bool = False,
    rounds: int = 10, budget: float = 60.0,
) -> Row:  # fmt: skip
    """fastlm as it comes against PyTorch as it comes and, "tuned", PyTorch with the allocator's best settings (glibc's; elsewhere they change nothing)."""
    sizes = sizes or SMALL
    common = {"dtype": dtype, "number_of_threads": number_of_threads, "sizes": sizes, "batch": batch, "context": context}
    actors: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        "fastlm": ({"library": "fastlm"}, {}),
        "eager": ({"library": "torch"}, {}),
        "eager tuned": ({"library": "torch"}, TUNED),
    }
    if compiled:
        actors["compiled tuned"] = ({"library": "torch", "compiled": True}, TUNED)
    with ExitStack() as stack:
        running = {name: stack.enter_context(Actor("step_timer", common | own, environment)) for name, (own, environment) in actors.items()}
        taken = in_turn(running, rounds, budget=budget)
        last = {name: actor.ask() for name, actor in running.items()}
    ours = taken.pop("fastlm")
    shape = f"GPT-2, {sizes['n_layer']} layers of {sizes['n_embd']}, {batch} × {context} tokens"
    return Row(
        "training_step", shape, dtype, number_of_threads, "step", ", ".join(last["fastlm"]["backends"]), statistics.median(ours),
        {name: Rival(statistics.median(theirs), Ratio.of(ours, theirs), last[name]["bytes"]) for name, theirs in taken.items()},
        bytes_held=last["fastlm"]["bytes"], tokens=batch * context,
    )  # fmt: skip


def compare_generation(
    dtype: str, number_of_threads: int, *, sizes: dict[str, int] | None = None, prompt: int = PROMPT, new_tokens: int = NEW_TOKENS,
    rounds: int = 10, budget: float = 30.0,
) -> Row:  # fmt: skip
    """One sequence, greedy, with a cache of keys and values on both sides."""
    sizes = sizes or SMALL
    model = model_of(sizes).to(DTYPES[dtype]).eval()
    plain = PlainGPT2.like(model).to(DTYPES[dtype]).eval()
    tokens = torch.randint(sizes["vocab_size"], (1, prompt), generator=torch.Generator().manual_seed(0))

    def ours():
        model.generate(tokens, max_new_tokens=new_tokens, eos_token_id=())

    with threads(number_of_threads):
        backend = served_by(ours)
        taken = in_turn({"fastlm": timed(ours), "eager": timed(lambda: plain.generate(tokens, new_tokens))}, rounds, budget=budget)
    mine = taken.pop("fastlm")
    shape = f"GPT-2, {sizes['n_layer']} layers of {sizes['n_embd']}, {prompt} tokens + {new_tokens}"
    return Row(
        "generation", shape, dtype, number_of_threads, "greedy", backend, statistics.median(mine),
        {name: Rival(statistics.median(theirs), Ratio.of(mine, theirs)) for name, theirs in taken.items()}, tokens=new_tokens,
    )  # fmt: skip
