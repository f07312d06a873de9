"""Everything that decides how a model is trained. The same settings and corpus give the same model, bit for bit."""

import dataclasses
import math

from fastlm.models.layers import RECOMPUTE
from fastlm.ops.boundary import mismatch
from fastlm.ops.gelu_mlp import LEVELS

OBJECTIVES = ("next-token", "masked-token")
TOKENIZERS = ("byte", "char")
DTYPES = ("float32", "bfloat16")
SHORT = {"fp32": "float32", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The defaults are nanoGPT's for a small character-level model on a CPU.

    dtype: "bfloat16" (or "bf16") keeps parameters, gradients, moments, statistics and the loss in float32 and runs the operators under autocast, with bfloat16
    activations and products. Parameters in bfloat16 with float32 masters in the optimiser would save the cast of the weights, 12 bytes per parameter and step
    or some 2 % of a step, but would also round the residual stream and the norms' weights to eight bits, which autocast does not. Checkpoints are float32
    either way.
    """

    objective: str = "next-token"
    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64  # tokens that a model sees at most
    batch: int = 12  # sequences of one context per step
    steps: int = 2000
    lr: float = 1e-3  # the highest, reached after warm-up
    min_lr: float = 1e-4  # from decay_steps on
    warmup: int = 100  # steps
    decay_steps: int | None = None  # None: all steps
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1  # of matrices only
    grad_clip: float = 1.0  # largest norm of all gradients together; 0: unlimited
    dropout: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    eval_every: int = 250  # steps
    recompute: int = (
        RECOMPUTE  # of every feed-forward part, in backward: 0 nothing, 1 the GELU, 2 the first product too
    )

    def __post_init__(self):
        one_of("objective", self.objective, OBJECTIVES)
        object.__setattr__(self, "dtype", SHORT.get(self.dtype, self.dtype))  # frozen for everyone else
        one_of("dtype", self.dtype, DTYPES)
        one_of("recompute", self.recompute, LEVELS)
        for name in ("layers", "heads", "width", "context", "batch", "steps", "eval_every"):
            whole(name, getattr(self, name), 1)
        whole("warmup", self.warmup, 0)
        if self.decay_steps is not None:
            whole("decay_steps", self.decay_steps, 1)
        whole("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise mismatch("seed", "a whole number below 2^63", self.seed)
        if self.width % self.heads:
            raise mismatch("width", f"a multiple of heads, {self.heads}", self.width)
        within("lr", self.lr, 0, math.inf, open_left=True)
        within("min_lr", self.min_lr, 0, self.lr, closed_right=True)
        within("beta1", self.beta1, 0, 1)
        within("beta2", self.beta2, 0, 1)
        within("weight_decay", self.weight_decay, 0, math.inf)
        within("grad_clip", self.grad_clip, 0, math.inf)
        within("dropout", self.dropout, 0, 1)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.context


def one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise mismatch(name, f"one of {', '.join(map(str, allowed))}", repr(value))


def whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise mismatch(name, f"a whole number of at least {least}", value)


def within(
    name: str, value: float, low: float, high: float, *, open_left: bool = False, closed_right: bool = False
) -> None:
    """Comparisons that are false for NaN, so that it is refused too."""
    inside = (value > low if open_left else value >= low) and (value <= high if closed_right else value < high)
    if not inside:
        raise mismatch(
            name, f"a number in {'(' if open_left else '['}{low}, {high}{']' if closed_right else ')'}", value
        )
