"""12 heads of 64 over eight packed sequences, 1024 tokens, beside PyTorch one sequence at a time; FLOPs and bytes are counted in operators.py.

And beside the padded batch that packing does without, half of which is padding: PyTorch's and our own, each on tensors that lie as a model's would.
"""

import torch
from torch.nn import functional as F

import fastlm
from benchmarks.support import every_way, run
from fastlm.benchmarking.compare import DTYPES
from fastlm.benchmarking.machine import threads
from fastlm.benchmarking.measure import Ratio, in_turn
from fastlm.benchmarking.operators import CASES, HEADS, ROWS, WIDTH, Case, normal, uneven


@every_way("attention_varlen")
def test_attention_varlen(benchmark, dtype, number_of_threads, direction):
    run(benchmark, "attention_varlen", dtype, number_of_threads, direction)


@every_way("attention_varlen")
def test_padded_batch(benchmark, dtype, number_of_threads, direction):
    packed, padded = CASES["attention_varlen"](DTYPES[dtype]), padded_batch(DTYPES[dtype])
    ways = {
        "packed": (packed, packed.ours),
        "fastlm padded": (padded, padded.ours),
        "PyTorch padded": (padded, padded.eager),
    }
    prepare, work = packed.parts(packed.ours, direction)
    with threads(number_of_threads):
        benchmark.pedantic(work, setup=lambda: ((prepare(),), {}), rounds=10, warmup_rounds=1)
        taken = in_turn(
            {name: case.timer(function, direction) for name, (case, function) in ways.items()},
            rounds=30,
            budget=3.0,
            least=2e-3,
        )
    ours = taken.pop("packed")
    benchmark.extra_info |= {f"times as fast as {name}": str(Ratio.of(ours, theirs)) for name, theirs in taken.items()}


def padded_batch(dtype: torch.dtype) -> Case:
    """The sequences of operators.py's case, each padded to the longest."""
    lengths = uneven(ROWS)
    batch, longest, head_dim = len(lengths), max(lengths), WIDTH // HEADS
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    case = CASES["attention_varlen"](dtype)
    projection = normal(batch, longest, 3, HEADS, head_dim, dtype=dtype)
    return Case(
        "attention",
        f"{batch} × {longest}, half of it padding",
        ours=lambda query, key, value: fastlm.attention(query, key, value, key_padding=real),
        eager=lambda query, key, value: F.scaled_dot_product_attention(
            query, key, value, attn_mask=real[:, None, None]
        ),
        inputs=projection.permute(2, 0, 3, 1, 4).unbind(0),
        upstream=[normal(batch, longest, HEADS, head_dim, dtype=dtype).transpose(1, 2)],
        forward=case.forward,
        backward=case.backward,
    )
