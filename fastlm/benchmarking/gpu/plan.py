"""What is measured on a GPU, the most important first: time may run out. Of each operator the largest and the smallest sizes come early, as rules reach as far
as what was measured."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from fastlm.benchmarking.gpu import cases
from fastlm.benchmarking.gpu.timing import Row, compare

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
VOCAB = 50257


@dataclasses.dataclass(frozen=True)
class Planned:
    make: Callable[..., cases.Case]
    dtype: torch.dtype
    sizes: dict[str, int | str]
    compiled: bool = False  # torch.compile is a rival too: seconds each, so in one shape of each

    def build(self, device: str, compiled: bool = True) -> cases.Case:
        return self.make(device, self.dtype, compiled and self.compiled, **self.sizes)

    def __str__(self) -> str:
        return f"{self.make.__name__}, {str(self.dtype).removeprefix('torch.')}, {', '.join(f'{name} {size}' for name, size in self.sizes.items())}"


def heads(batch: int, tokens: int, number: int = 12, head_dim: int = 64) -> dict[str, int | str]:
    return {"batch": batch, "heads": number, "tokens": tokens, "head_dim": head_dim}


def wide(rows: int, width: int = 768) -> dict[str, int | str]:
    return {"rows": rows, "width": width}


packed: dict[str, int | str] = {"tokens": 4096, "heads": 12, "head_dim": 64, "times": 4}
FIRST = (  # then a training step
    Planned(cases.attention, BF16, heads(16, 1024), compiled=True),
    Planned(cases.layernorm_residual, BF16, wide(4096), compiled=True),
)
THEN = (
    Planned(cases.layernorm_residual, BF16, wide(8), compiled=True),
    *(
        Planned(cases.layernorm_residual, BF16, wide(*sizes))
        for sizes in ((128,), (1024,), (16384,), (16384, 1600), (65536, 256))
    ),
    Planned(cases.attention, BF16, heads(4, 4096)),
    Planned(cases.attention, BF16, heads(8, 2048, 16, 128)),
    Planned(cases.attention_decode, BF16, heads(64, 1024)),
    Planned(cases.attention_decode, BF16, heads(1, 1024), compiled=True),
    *(Planned(cases.attention_decode, BF16, sizes) for sizes in (heads(8, 1024), heads(8, 4096))),
    Planned(cases.gelu_mlp, BF16, wide(16384), compiled=True),
    Planned(cases.linear_cross_entropy, BF16, wide(16384) | {"vocab": VOCAB}, compiled=True),
    *(Planned(cases.layernorm_residual, dtype, wide(rows)) for dtype in (FP32, FP16) for rows in (4096, 128)),
    Planned(cases.attention, FP16, heads(16, 1024)),
    Planned(cases.attention, FP32, heads(4, 1024)),
    *(Planned(cases.attention_decode, dtype, heads(8, 1024)) for dtype in (FP32, FP16)),
    Planned(cases.attention_varlen, BF16, packed, compiled=True),
    Planned(cases.attention_varlen, BF16, packed | {"causal": True}),
    Planned(cases.attention, BF16, heads(32, 512) | {"causal": False}),
    Planned(cases.gelu_mlp, BF16, wide(4096, 1600)),
    Planned(cases.gelu_mlp, BF16, wide(4096) | {"layout": "linear"}),
    Planned(cases.linear_cross_entropy, BF16, wide(2048) | {"vocab": VOCAB}),
    Planned(cases.gelu_mlp, FP32, wide(4096)),
    Planned(cases.linear_cross_entropy, FP32, wide(2048) | {"vocab": VOCAB}),
)
# Each kind of case once, for where nothing is to be learnt of speed.
SMALL = (
    Planned(cases.attention, FP32, heads(1, 32, 2, 16)),
    Planned(cases.attention, FP32, heads(1, 32, 2, 16) | {"causal": False}),
    Planned(cases.attention_decode, FP32, heads(2, 300, 2, 16)),
    Planned(cases.attention_varlen, FP32, {"tokens": 64, "heads": 2, "head_dim": 16}),
    Planned(cases.attention_varlen, FP32, {"tokens": 64, "heads": 2, "head_dim": 16, "causal": True}),
    Planned(cases.layernorm_residual, FP32, wide(32, 48)),
    Planned(cases.gelu_mlp, FP32, wide(32, 48)),
    Planned(cases.gelu_mlp, FP32, wide(32, 48) | {"layout": "linear"}),
    Planned(cases.linear_cross_entropy, FP32, wide(32, 48) | {"vocab": 101}),
)


@dataclasses.dataclass
class Run:
    """Of measurements within a time: what went wrong, and what was not begun any more."""

    limit: float = float("inf")  # seconds
    stopped: bool = False  # from outside
    failed: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        return self.stopped or time.monotonic() - self.began > self.limit

    def attempt(self, what: str, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
        """The rows as they come. One that cannot be measured says why, and the others are."""
        if self.over:
            self.left_out.append(what)
            return
        try:
            yield from rows()
        except Exception as error:  # a kernel's, the compiler's, out of memory: a GPU is seldom at hand, and the others are to be measured
            self.failed.append(f"{what}: {' '.join(str(error).split())[:1000] or type(error).__name__}")

    def measure(
        self, device: str, planned: Sequence[Planned], *, rivals: bool = True, **options: float
    ) -> Iterator[Row]:
        """rivals: others than the backends that `auto` chooses among, too."""
        for one in planned:
            yield from self.attempt(
                str(one), lambda one=one: compare(one.build(device, compiled=rivals), device, rivals, **options)
            )  # type: ignore[misc]
            if device == "cuda":
                torch.cuda.empty_cache()
