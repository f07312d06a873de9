"""Training steps of GPT-2 and BERT, and generation: fastlm's models and plain PyTorch ones with the same weights."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

import fastlm
from fastlm.benchmarking.compare import DTYPES, Row, baselines_of
from fastlm.benchmarking.machine import Probe, arithmetic, best, peak, reading, threads
from fastlm.benchmarking.measure import Timer, interleaved, timed
from fastlm.benchmarking.memory import resident_growth
from fastlm.benchmarking.operators import backends_of
from fastlm.benchmarking.worker import Worker
from fastlm.models import BertConfig, BertForMaskedLM, CausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig
from fastlm.models.language_model import LanguageModel
from fastlm.models.layers import RECOMPUTE
from fastlm.training.baseline import PlainGPT2
from fastlm.training.baseline_bert import PlainBert
from fastlm.training.data.order import draws
from fastlm.training.objectives import MaskedToken, NextToken
from fastlm.training.settings import Settings
from fastlm.training.trainer import Loss, Trainer

SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
PROMPT, NEW_TOKENS = 64, 64

Work = tuple[Timer, Callable[[], int | None]]  # of a worker process: a timer, and its peak memory use


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


# 1. In a worker process


def fastlm_model(subject: Subject, recompute: int) -> tuple[nn.Module, Loss]:
    model = subject.model()
    model.recompute = recompute
    return model, subject.objective().loss


def plain_model(subject: Subject) -> tuple[nn.Module, Loss]:
    """The same weights in plain PyTorch; nothing of fastlm's model stays in memory."""
    kind = PlainGPT2 if subject.kind == "GPT-2" else PlainBert
    return kind.like(subject.model()), kind.loss


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
    torch.set_num_threads(number_of_threads)
    if tuned:
        fastlm.tune_allocator()
    about = Subject(**subject)
    model, loss = plain_model(about) if library != "fastlm" else fastlm_model(about, recompute)
    if compiled:
        model = cast(nn.Module, torch.compile(model))
    settings = Settings(batch=about.batch, context=about.context, dtype=dtype, width=about.width, heads=about.heads)
    trainer = Trainer(model, settings, loss, native=library != "fastlm")
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
    others: Mapping[str, Timer] | None = None,
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """fastlm with its allocator tuned, and PyTorch with default and with tuned settings, each in a worker process.

    Args:
        function, arguments: as for Worker; it also gets library, tuned and, if true, compiled.
        others: timed in the same rounds.

    Returns:
        (the seconds of each, the last answer of each worker process).
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
        seconds = interleaved({**workers, **(others or {})}, rounds, budget=budget)
        return seconds, {name: worker.ask() for name, worker in workers.items()}


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
    seconds, last = compare_processes(
        "whole.step_timer", arguments, compiled=compiled, rounds=rounds, budget=budget, others={"machine": machine}
    )
    return Row(
        "training_step",
        str(subject),
        dtype,
        number_of_threads,
        "step",
        ", ".join(last["fastlm"]["backends"]),
        statistics.median(seconds["fastlm"]),
        baselines_of(seconds, {name: answer["bytes"] for name, answer in last.items()}, but=["machine"]),
        share=probe.share(subject.flops(), seconds["fastlm"], seconds["machine"]),
        bound="arithmetic",
        bytes_held=last["fastlm"]["bytes"],
        tokens=subject.batch * subject.context,
        recompute=recompute,
    )


# Sizes of the models that generate.
GENERATORS: dict[str, dict[str, Any]] = {
    "gpt2": SMALL,
    "smollm2": {  # of 135 million parameters
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True,
    },
}


def generator(name: str, dtype: torch.dtype, sizes: dict[str, Any] | None = None) -> LanguageModel:
    """One of GENERATORS with random weights, or of its architecture with other sizes."""
    torch.manual_seed(0)
    sizes = sizes or GENERATORS[name]
    if name == "gpt2":
        config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return GPT2LMHeadModel(config).to(dtype).eval()
    return CausalLM(LlamaConfig(**sizes)).to(dtype).eval()


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


def bytes_per_token(model: LanguageModel) -> int:
    """Of the weights that a new token reads: all but embeddings, which are looked up, unless tied to the output."""
    output = cast(Any, model).lm_head.weight
    looked_up = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return sum(p.nbytes for p in model.parameters() if p is output or not any(p is weight for weight in looked_up))


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
    plain = baseline_generate(name, model)
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
