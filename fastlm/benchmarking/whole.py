"""Whole training steps of GPT-2 and BERT, and whole generations: fastlm's models and the plain PyTorch ones, same weights, same tokens."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

import fastlm
from fastlm.benchmarking.actor import Actor
from fastlm.benchmarking.compare import DTYPES, Rival, Row, served_by
from fastlm.benchmarking.machine import Probe, arithmetic, best, peak, threads
from fastlm.benchmarking.measure import Ratio, Timer, in_turn, timed
from fastlm.benchmarking.resident import rise
from fastlm.models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from fastlm.models.layers import RECOMPUTE
from fastlm.training.baseline import PlainGPT2
from fastlm.training.baseline_bert import PlainBert
from fastlm.training.loop import Loss, Trainer
from fastlm.training.objectives import MaskedToken, NextToken
from fastlm.training.settings import Settings

SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
PROMPT, NEW_TOKENS = 64, 64


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
    dropout: float = 0.0  # everywhere where the architecture has some

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
        return (
            NextToken()
            if self.kind == "GPT-2"
            else MaskedToken(vocabulary=self.vocabulary, mask_token=min(103, self.vocabulary - 1))
        )

    def pairs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return self.objective().pairs(
            torch.randint(self.vocabulary, (self.batch, self.context + 1), generator=generator), generator
        )

    def flops(self) -> float:
        """Of a step, at least: a multiply-add of every weight for every token, of the output projection for every token that is predicted, and twice that in
        backward; the two products of attention, of which backward has two each and the scores again. Looking up embeddings is free.
        """
        tokens, predicted = self.batch * self.context, int((self.pairs()[1] >= 0).sum())
        head = self.vocabulary * self.width + (self.width**2 if self.kind == "BERT" else 0)
        products = 3 * 2 * (tokens * self.layers * 12 * self.width**2 + predicted * head)
        seen = (self.context + 1) / 2 if self.kind == "GPT-2" else self.context  # by a token, on average
        return products + 3.5 * self.layers * 2 * 2 * tokens * seen * self.width


MODELS = {
    "gpt2": Subject("GPT-2", 12, 768, 12, 50257, 2, 512),
    "gpt2-dropout": Subject("GPT-2", 12, 768, 12, 50257, 2, 512, 0.1),
    "bert": Subject("BERT", 12, 768, 12, 30522, 8, 128, 0.1),
    "small": Subject("GPT-2", 6, 384, 6, 256, 12, 256),  # nanoGPT's sizes for one GPU, on bytes
    "tiny": Subject("GPT-2", 4, 128, 4, 256, 12, 64),  # and for a CPU
}


def fused_model(about: Subject, recompute: int) -> tuple[nn.Module, Loss]:
    model = about.model()
    model.recompute = recompute
    return model, about.objective().loss


def plain_model(about: Subject) -> tuple[nn.Module, Loss]:
    """The same weights; nothing else of fastlm's model is left in memory."""
    kind = PlainGPT2 if about.kind == "GPT-2" else PlainBert
    return kind.like(about.model()), kind.loss


def step_timer(
    *,
    library: str,
    dtype: str,
    number_of_threads: int,
    subject: dict[str, Any],
    tuned: bool,
    compiled: bool = False,
    recompute: int = RECOMPUTE,
) -> tuple[Timer, Callable[[], int | None]]:
    """In an actor: one training step as the trainer takes it, with clipping and AdamW; and by how much memory rose above model and optimiser state."""
    torch.set_num_threads(number_of_threads)
    about = Subject(**subject)
    model, loss = plain_model(about) if library != "fastlm" else fused_model(about, recompute)
    if compiled:
        model = cast(nn.Module, torch.compile(model))
    if tuned:
        fastlm.tune_allocator()
    settings = Settings(batch=about.batch, context=about.context, dtype=dtype, width=about.width, heads=about.heads)
    trainer = Trainer(model, settings, loss, native=library != "fastlm")
    inputs, targets = about.pairs()
    # AdamW's moments, which PyTorch's makes in the first step
    held = rise(sum(2 * 4 * p.numel() for p in trainer.parameters if p not in trainer.optimizer.state))
    return timed(lambda: trainer.step(inputs, targets, 1e-4)), held


def machine_timer(number_of_threads: int, dtypes: Iterable[torch.dtype]) -> tuple[Probe, Timer]:
    """Of the faster of the dtypes' arithmetic, beside processes that work in turn: after a turn their threads wait busily for some milliseconds, as do ours."""
    probe = arithmetic(number_of_threads, max(dtypes, key=lambda dtype: peak(number_of_threads, dtype)))

    def timer() -> float:
        time.sleep(0.1)
        seconds = best(probe.call)
        time.sleep(0.1)
        return seconds

    return probe, timer


def contest(
    work: str,
    common: dict[str, Any],
    *,
    compiled: bool,
    rounds: int,
    budget: float,
    others: Mapping[str, Timer] | None = None,
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """fastlm, its allocator tuned, and PyTorch as it comes and "tuned" in the same way, each in a process of its own; others: what else is timed in turn.

    Returns:
        the seconds of each, and what each process said last.
    """
    actors: dict[str, dict[str, Any]] = {
        "fastlm": {"library": "fastlm", "tuned": True},
        "eager": {"library": "torch", "tuned": False},
        "eager tuned": {"library": "torch", "tuned": True},
    }
    if compiled:
        actors["compiled"] = {"library": "torch", "tuned": False, "compiled": True}
        actors["compiled tuned"] = {"library": "torch", "tuned": True, "compiled": True}
    with ExitStack() as stack:
        running = {name: stack.enter_context(Actor(work, common | own)) for name, own in actors.items()}
        taken = in_turn({**running, **(others or {})}, rounds, budget=budget)
        return taken, {name: actor.ask() for name, actor in running.items()}


def rivals(taken: Mapping[str, list[float]], last: Mapping[str, dict[str, Any]]) -> dict[str, Rival]:
    """Of a contest, all processes but fastlm's."""
    return {
        name: Rival(statistics.median(taken[name]), Ratio.of(taken["fastlm"], taken[name]), said["bytes"])
        for name, said in last.items()
        if name != "fastlm"
    }


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
    """At a level of recomputation, which is ours alone."""
    common = {
        "dtype": dtype,
        "number_of_threads": number_of_threads,
        "subject": dataclasses.asdict(subject),
        "recompute": recompute,
    }
    probe, timer = machine_timer(
        number_of_threads, {torch.float32, DTYPES[dtype]}
    )  # bfloat16 is a type to store in: its limit is the faster arithmetic
    taken, last = contest(
        "whole.step_timer", common, compiled=compiled, rounds=rounds, budget=budget, others={"machine": timer}
    )
    ours, said = taken["fastlm"], last["fastlm"]
    return Row(
        "training_step",
        str(subject),
        dtype,
        number_of_threads,
        "step",
        ", ".join(said["backends"]),
        statistics.median(ours),
        rivals(taken, last),
        share=probe.share(subject.flops(), ours, taken["machine"]),
        bound="arithmetic",
        bytes_held=said["bytes"],
        tokens=subject.batch * subject.context,
        recompute=recompute,
    )


def model_of(sizes: dict[str, Any], seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def compare_generation(
    dtype: str,
    number_of_threads: int,
    *,
    sizes: dict[str, int] | None = None,
    prompt: int = PROMPT,
    new_tokens: int = NEW_TOKENS,
    rounds: int = 10,
    budget: float = 30.0,
) -> Row:
    """One sequence, greedy, with a cache of keys and values on both sides."""
    sizes = sizes or SMALL
    model = model_of(sizes).to(DTYPES[dtype]).eval()
    plain = PlainGPT2.like(model).to(DTYPES[dtype]).eval()
    tokens = torch.randint(sizes["vocab_size"], (1, prompt), generator=torch.Generator().manual_seed(0))

    def ours():
        model.generate(tokens, max_new_tokens=new_tokens, eos_token_id=())

    with threads(number_of_threads):
        backend = served_by(ours)
        taken = in_turn(
            {"fastlm": timed(ours), "eager": timed(lambda: plain.generate(tokens, new_tokens))}, rounds, budget=budget
        )
    mine = taken.pop("fastlm")
    shape = f"GPT-2, {sizes['n_layer']} layers of {sizes['n_embd']}, {prompt} tokens + {new_tokens}"
    return Row(
        "generation",
        shape,
        dtype,
        number_of_threads,
        "greedy",
        backend,
        statistics.median(mine),
        {name: Rival(statistics.median(theirs), Ratio.of(mine, theirs)) for name, theirs in taken.items()},
        tokens=new_tokens,
    )
