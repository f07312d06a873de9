"""Training settings. The same settings and corpus give bit-identical models."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from fastlm.core.errors import did_you_mean, mismatch
from fastlm.models.layers import RECOMPUTE
from fastlm.ops.gelu_mlp.spec import RECOMPUTE_LEVELS
from fastlm.training.schedule import SCHEDULES

OBJECTIVES = ("next-token", "masked-token")
ARCHITECTURES = {"gpt2": "next-token", "llama": "next-token", "bert": "masked-token"}  # and their objectives
TOKENIZERS = ("byte", "char")
DOCUMENTS = ("stream", "packed")
PARALLEL = ("ddp", "fsdp")
DTYPES = ("float32", "bfloat16", "float16")
WHOLE_LAYERS = 3  # of recompute
RECOMPUTED = (*RECOMPUTE_LEVELS, WHOLE_LAYERS)
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Panels of the options.
DATA, MODEL, OPTIMISER = "Data", "Model", "Optimiser"
MACHINE, CHECKPOINTS, WATCHING = "Machine", "Checkpoints", "Watching"


def option(default: Any, text: str, panel: str | None = None, metavar: str | None = None) -> Any:
    """A field with its help: the command line has an option for each, see fastlm/commands/options.py."""
    return dataclasses.field(default=default, metadata={"help": text, "panel": panel, "metavar": metavar})


@dataclasses.dataclass(frozen=True)
class Settings:
    """The defaults are those of nanoGPT for a small character-level model on a CPU.

    With dtype "bfloat16" (or "bf16"; likewise float16) the operators run under autocast: activations and matrix
    products are bfloat16; parameters, gradients, optimiser state, statistics and the loss are float32. Parameters in
    bfloat16 with float32 master weights in the optimiser would save the cast of the weights (12 bytes per parameter and
    step, about 2 % of a step), but would also round the residual stream and the weights of the norms to 8 bits.
    Checkpoints are float32 with either dtype.
    """

    objective: str = option(
        "next-token", "next-token: trains a GPT-2; masked-token: trains a BERT.", None, "next-token|masked-token"
    )
    documents: str = option(
        "stream",
        "stream: documents are one text; packed: attention does not cross their boundaries.",
        DATA,
        "|".join(DOCUMENTS),
    )
    whole_words: bool = option(False, "With masked-token: mask all tokens of a word, or none.", DATA)
    architecture: str | None = option(
        None,
        "gpt2 or llama (today's decoders: RMSNorm, rotary positions, gated MLP) for next-token, bert for "
        "masked-token. Default: gpt2 or bert, by --objective.",
        MODEL,
        "|".join(ARCHITECTURES),
    )
    layers: int = option(4, "Number of layers.", MODEL)
    heads: int = option(4, "Number of attention heads per layer.", MODEL)
    kv_heads: int | None = option(
        None, "Number of heads of keys and values of a llama; a divisor of --heads. Default: --heads.", MODEL
    )
    width: int = option(128, "Hidden size; a multiple of --heads.", MODEL)
    mlp_width: int | None = option(
        None, "Hidden size of the MLP. Default: 4 × --width, for a llama 8/3 × --width.", MODEL
    )
    context: int = option(64, "Maximum number of tokens of a sequence.", MODEL)
    lora: int = option(
        0, "Rank of low-rank adapters (LoRA) that are trained instead of the weights of --init; 0: none.", MODEL
    )
    lora_alpha: int | None = option(None, "Factor of the adapters, divided by their rank. Default: 2 × --lora.", MODEL)
    batch: int = option(12, "Number of sequences per step.", OPTIMISER)
    micro_batch: int | None = option(
        None, "Number of sequences that run at once; their gradients add up to the step's. Default: --batch.", OPTIMISER
    )
    steps: int = option(2000, "Number of training steps.", OPTIMISER)
    schedule: str = option(
        "cosine",
        "What follows the warm-up: cosine or linear decay to --min-lr; constant; or wsd, constant with a decay over "
        "the last --decay-fraction of the steps.",
        OPTIMISER,
        "|".join(SCHEDULES),
    )
    lr: float = option(1e-3, "Maximum learning rate, reached after --warmup steps.", OPTIMISER)
    min_lr: float = option(1e-4, "Learning rate from step --decay-steps on.", OPTIMISER)
    warmup: int = option(100, "Number of steps of linear warm-up.", OPTIMISER)
    decay_steps: int | None = option(
        None, "Step at which the schedule reaches --min-lr; default: the last step.", OPTIMISER
    )
    decay_fraction: float = option(0.2, "Fraction of --decay-steps in which --schedule wsd decays.", OPTIMISER)
    beta1: float = option(0.9, "AdamW's decay rate of the first moment.", OPTIMISER)
    beta2: float = option(0.99, "AdamW's decay rate of the second moment.", OPTIMISER)
    weight_decay: float = option(0.1, "AdamW's weight decay, applied to matrices only.", OPTIMISER)
    grad_clip: float = option(1.0, "Maximum global gradient norm; 0: no clipping.", OPTIMISER)
    max_skipped: int = option(
        10, "Number of skipped steps in a row (loss or gradient not finite, or a spike) that end the run.", OPTIMISER
    )
    skip_spikes: float = option(
        0.0,
        "Skip steps whose loss is above median + this × 1.4826 × MAD of the last 128 losses; 0: none. "
        "8 leaves ordinary batches alone.",
        OPTIMISER,
    )
    ema: float = option(
        0.0, "Decay of the moving average of the weights, which is evaluated and saved; 0: none.", OPTIMISER
    )
    dropout: float = option(0.0, "Dropout probability, in [0, 1).", MODEL)
    seed: int = option(0, "Random seed of weights, batches and dropout.", OPTIMISER)
    dtype: str = option(
        "float32",
        "bfloat16, float16 (also bf16, fp16): activations and matrix products in 16 bits, for float16 with a gradient "
        "scaler; weights and optimiser state stay float32.",
        MACHINE,
        "|".join(DTYPES),
    )
    parallel: str = option(
        "ddp",
        "On several processes (torchrun): ddp, each has the model; fsdp, each has a part of every parameter.",
        MACHINE,
        "|".join(PARALLEL),
    )
    eval_every: int = option(250, "Number of steps between evaluations.", WATCHING)
    patience: int = option(
        0, "Stop after this number of evaluations in a row without a lower validation loss; 0: never.", WATCHING
    )
    sample_every: int = option(0, "Number of steps between samples of text; 0: none.", WATCHING)
    tensorboard: bool = option(False, "Write event files for TensorBoard, too.", WATCHING)
    prompt: str = option("\n", "The text that the samples continue.", WATCHING, "TEXT")
    recompute: int = option(
        RECOMPUTE,
        "What backward recomputes to save memory: 0 nothing, 1 the GELU, 2 also the product before it, 3 the layers. "
        "With --lora 1 or 3.",
        MACHINE,
        "|".join(map(str, RECOMPUTED)),
    )
    checkpoint_every: int = option(
        250, "Number of steps between checkpoints; 0: one at the end or on a signal only.", CHECKPOINTS
    )
    keep: int = option(2, "Number of checkpoints to keep, besides that with the lowest validation loss.", CHECKPOINTS)

    def __post_init__(self):
        check_one_of("objective", self.objective, OBJECTIVES)
        check_one_of("documents", self.documents, DOCUMENTS)
        if self.lora and self.documents == "packed" and self.objective == "masked-token":
            raise mismatch("documents", "stream with lora and objective masked-token", self.documents)
        if self.whole_words and self.objective != "masked-token":
            raise mismatch("whole_words", "False unless objective is masked-token", self.whole_words)
        object.__setattr__(self, "dtype", check_dtype("dtype", self.dtype, DTYPES))  # the class is frozen
        check_one_of("parallel", self.parallel, PARALLEL)
        check_one_of("schedule", self.schedule, SCHEDULES)
        check_one_of("recompute", self.recompute, RECOMPUTED)
        for name in ("layers", "heads", "width", "context", "batch", "steps", "eval_every", "keep", "max_skipped"):
            check_integer(name, getattr(self, name), 1)
        for name in ("warmup", "checkpoint_every", "patience", "sample_every", "lora"):
            check_integer(name, getattr(self, name), 0)
        for name in ("decay_steps", "micro_batch", "kv_heads", "mlp_width"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        if self.micro_batch is not None and self.micro_batch > self.batch:
            raise mismatch("micro_batch", f"at most batch = {self.batch}", self.micro_batch)
        check_seed(self.seed)
        if self.width % self.heads:
            raise mismatch("width", f"a multiple of heads = {self.heads}", self.width)
        self.check_architecture()
        check_range("lr", self.lr, 0, math.inf, open_left=True)
        check_range("min_lr", self.min_lr, 0, self.lr, closed_right=True)
        check_range("decay_fraction", self.decay_fraction, 0, 1, open_left=True, closed_right=True)
        check_range("beta1", self.beta1, 0, 1)
        check_range("beta2", self.beta2, 0, 1)
        check_range("weight_decay", self.weight_decay, 0, math.inf)
        check_range("grad_clip", self.grad_clip, 0, math.inf)
        if self.lora_alpha is not None:
            if not self.lora:
                raise mismatch("lora_alpha", "no value without --lora", self.lora_alpha)
            check_integer("lora_alpha", self.lora_alpha, 1)
        check_range("skip_spikes", self.skip_spikes, 0, math.inf)
        check_range("ema", self.ema, 0, 1)
        check_range("dropout", self.dropout, 0, 1)
        if self.sample_every and self.objective != "next-token":
            raise mismatch("sample_every", f"0 with objective {self.objective}", self.sample_every)

    def check_architecture(self) -> None:
        if self.architecture is not None:
            check_one_of("architecture", self.architecture, tuple(ARCHITECTURES))
            if (objective := ARCHITECTURES[self.architecture]) != self.objective:
                raise mismatch("objective", f"{objective} for a {self.architecture}", repr(self.objective))
        if self.kv_heads is not None:
            if self.architecture != "llama":
                raise mismatch("kv_heads", "no value without --architecture llama", self.kv_heads)
            if self.heads % self.kv_heads:
                raise mismatch("kv_heads", f"a divisor of heads = {self.heads}", self.kv_heads)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.context

    @property
    def at_once(self) -> int:
        """Number of sequences of a forward pass."""
        return self.batch if self.micro_batch is None else self.micro_batch


def check_one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        expected = f"one of {', '.join(map(str, allowed))}"
        raise mismatch(name, expected, f"{value!r}{did_you_mean(value, allowed)}")


def short_names(allowed: Collection[str]) -> dict[str, str]:
    return {short: name for short, name in SHORT_DTYPES.items() if name in allowed}


def check_dtype(argument: str, value: str, allowed: tuple[str, ...]) -> str:
    """The long name of a dtype, which may be given by either."""
    short = short_names(allowed)
    name = short.get(value, value)
    if name not in allowed:
        expected = f"one of {', '.join(allowed)} (also {', '.join(short)})"
        raise mismatch(argument, expected, f"{value!r}{did_you_mean(value, (*allowed, *short))}")
    return name


def check_integer(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise mismatch(name, f"an integer >= {minimum}", value)


def check_seed(seed: object) -> None:
    check_integer("seed", seed, 0)
    if seed >= 2**63:  # type: ignore[operator]
        raise mismatch("seed", "an integer < 2^63", seed)


def check_range(
    name: str, value: float, low: float, high: float, *, open_left: bool = False, closed_right: bool = False
) -> None:
    """The comparisons are false for NaN, so NaN is an error."""
    inside = (value > low if open_left else value >= low) and (value <= high if closed_right else value < high)
    if not inside:
        raise mismatch(
            name, f"a number in {'(' if open_left else '['}{low}, {high}{']' if closed_right else ')'}", value
        )
