"""Training settings. The same settings and corpus give bit-identical models."""

import dataclasses
import math

from fastlm.core.errors import did_you_mean, mismatch
from fastlm.models.layers import RECOMPUTE
from fastlm.ops.gelu_mlp.spec import RECOMPUTE_LEVELS

OBJECTIVES = ("next-token", "masked-token")
TOKENIZERS = ("byte", "char")
DOCUMENTS = ("stream", "packed")
DTYPES = ("float32", "bfloat16")
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The defaults are those of nanoGPT for a small character-level model on a CPU.

    With dtype "bfloat16" (or "bf16") the operators run under autocast: activations and matrix products are bfloat16;
    parameters, gradients, optimiser state, statistics and the loss are float32. Parameters in bfloat16 with float32
    master weights in the optimiser would save the cast of the weights (12 bytes per parameter and step, about 2 % of a
    step), but would also round the residual stream and the weights of the norms to 8 bits. Checkpoints are float32 with
    either dtype.
    """

    objective: str = "next-token"
    documents: str = "stream"  # "packed": attention does not cross the boundaries of documents
    whole_words: bool = False  # masked-token training masks all tokens of a word or none
    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64  # maximum number of tokens of a sequence
    batch: int = 12  # sequences per step
    steps: int = 2000
    lr: float = 1e-3  # maximum learning rate, reached after warm-up
    min_lr: float = 1e-4  # learning rate from step decay_steps on
    warmup: int = 100  # steps of linear warm-up
    decay_steps: int | None = None  # None: steps
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1  # of matrices only, not of biases and norms
    grad_clip: float = 1.0  # maximum global gradient norm; 0: no clipping
    dropout: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    eval_every: int = 250  # steps between evaluations
    recompute: int = RECOMPUTE  # see PretrainedModel.recompute
    checkpoint_every: int = 250  # steps between checkpoints; 0: one at the end only
    keep: int = 2  # number of checkpoints to keep, besides that with the lowest validation loss

    def __post_init__(self):
        check_one_of("objective", self.objective, OBJECTIVES)
        check_one_of("documents", self.documents, DOCUMENTS)
        if self.whole_words and self.objective != "masked-token":
            raise mismatch("whole_words", "False unless objective is masked-token", self.whole_words)
        object.__setattr__(self, "dtype", SHORT_DTYPES.get(self.dtype, self.dtype))  # the class is frozen
        check_one_of("dtype", self.dtype, DTYPES)
        check_one_of("recompute", self.recompute, RECOMPUTE_LEVELS)
        for name in ("layers", "heads", "width", "context", "batch", "steps", "eval_every", "keep"):
            check_integer(name, getattr(self, name), 1)
        for name in ("warmup", "checkpoint_every"):
            check_integer(name, getattr(self, name), 0)
        if self.decay_steps is not None:
            check_integer("decay_steps", self.decay_steps, 1)
        check_seed(self.seed)
        if self.width % self.heads:
            raise mismatch("width", f"a multiple of heads = {self.heads}", self.width)
        check_range("lr", self.lr, 0, math.inf, open_left=True)
        check_range("min_lr", self.min_lr, 0, self.lr, closed_right=True)
        check_range("beta1", self.beta1, 0, 1)
        check_range("beta2", self.beta2, 0, 1)
        check_range("weight_decay", self.weight_decay, 0, math.inf)
        check_range("grad_clip", self.grad_clip, 0, math.inf)
        check_range("dropout", self.dropout, 0, 1)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.context


def check_one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        expected = f"one of {', '.join(map(str, allowed))}"
        raise mismatch(name, expected, f"{value!r}{did_you_mean(value, allowed)}")


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
