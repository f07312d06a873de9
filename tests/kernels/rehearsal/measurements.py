"""`fastlm bench --gpu` in a rehearsal: all cases, on the CPU, at sizes that take it no time.

Widths, heads, vocabularies and dtypes are those of the cases, so the kernels that are compiled are too.
"""

import dataclasses
import functools
import time

import torch

from fastlm.backends import table
from fastlm.benchmarking.gpu import models, plan, timing
from fastlm.commands import bench_gpu
from fastlm.models.bench import GENERATORS
from tests.kernels.rehearsal.stand_in import note, processor_time

MOST = {"rows": 64, "batch": 16, "tokens": 128, "repeats": 1}
STEP = dataclasses.replace(models.STEP, layers=2, batch=2, context=128)
TWO_LAYERS = GENERATORS["gpt2"] | {"n_layer": 2}


def smaller(case):
    """The case with few rows and short sequences. A decoding step keeps its keys, by which they are split."""
    most = MOST | {"tokens": 4096, "batch": 8} if case.name == "attention_decode" else MOST
    sizes = {name: min(size, most.get(name, size)) if type(size) is int else size for name, size in case.sizes.items()}
    return dataclasses.replace(case, sizes=sizes)


def on_this_cpu() -> None:
    """Changes the command, in this process: tensors on the CPU, whose backends are those of a GPU."""
    table.ORDER["cpu"] = table.ORDER["cuda"]
    table.rules_of = lambda device: ()
    planned, attempt = plan.planned, plan.Run.attempt
    plan.planned = lambda: tuple([(smaller(case), dtype) for case, dtype in pairs] for pairs in planned())
    bench_gpu.training_step = functools.partial(models.training_step, subject=STEP)
    bench_gpu.generation = functools.partial(models.generation, new_tokens=16, sizes=TWO_LAYERS)
    bench_gpu.peaks = lambda device, dtypes: timing.peaks(device, dtypes, size=128, copied=1 << 24)
    timing.l2_bytes = lambda device: 50 << 20
    bench_gpu.run = functools.partial(bench_gpu.run, device="cpu")
    torch.compile = lambda function, **options: function  # it would ask the GPU for more than the stub has

    def noted(self, what, rows):
        left_out, began, processor_began = self.over, time.monotonic(), processor_time()
        try:
            yield from attempt(self, what, rows)
        finally:
            if not left_out:
                note(f"  {what}", began, processor_began)

    plan.Run.attempt = noted
