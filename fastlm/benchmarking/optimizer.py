"""One AdamW step over the parameters of GPT-2 small, clipping included: fastlm's pass against what PyTorch does for the same."""

import statistics
from collections.abc import Sequence

import torch

from fastlm.benchmarking.compare import DTYPES, Rival, Row, served_by
from fastlm.benchmarking.machine import Work, reading, threads
from fastlm.benchmarking.measure import Ratio, Timer, in_turn, timed
from fastlm.models import GPT2Config, GPT2LMHeadModel
from fastlm.optim import AdamW

LARGEST_NORM = 1.0


def gpt2_shapes() -> list[torch.Size]:
    with torch.device("meta"):
        return [p.shape for p in GPT2LMHeadModel(GPT2Config.preset("gpt2")).parameters()]


def adamw(parameters: list[torch.Tensor]) -> Timer:
    optimizer = AdamW(parameters, max_grad_norm=LARGEST_NORM, master_weights=True)
    return timed(optimizer.step)


def torch_adamw(parameters: list[torch.Tensor]) -> Timer:
    """Fused AdamW after clip_grad_norm_; 16-bit parameters are copies of float32 ones, which is how PyTorch is given master weights."""
    if parameters[0].dtype == torch.float32:
        optimizer = torch.optim.AdamW(parameters, fused=True)

        def step():
            torch.nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)
            optimizer.step()

        return timed(step)
    masters = [p.detach().float().requires_grad_() for p in parameters]
    for master in masters:
        master.grad = torch.empty_like(master)
    optimizer = torch.optim.AdamW(masters, fused=True)

    @torch.no_grad()
    def step_of_masters():
        torch._foreach_copy_([m.grad for m in masters], [p.grad for p in parameters])
        torch.nn.utils.clip_grad_norm_(masters, LARGEST_NORM)
        optimizer.step()
        torch._foreach_copy_(parameters, masters)

    return timed(step_of_masters)


def compare_adamw(
    dtype: str,
    number_of_threads: int,
    *,
    shapes: Sequence[torch.Size] | None = None,
    rounds: int = 30,
    budget: float = 3.0,
) -> Row:
    shapes = shapes or gpt2_shapes()
    generator = torch.Generator().manual_seed(0)
    parameters = {}
    for name in ("fastlm", "eager"):
        parameters[name] = [
            torch.randn(shape, generator=generator).mul_(0.02).to(DTYPES[dtype]).requires_grad_() for shape in shapes
        ]
        for p in parameters[name]:
            p.grad = torch.randn(p.shape, generator=generator).mul_(1e-3).to(p.dtype)
    with threads(number_of_threads):
        timers = {"fastlm": adamw(parameters["fastlm"]), "eager": torch_adamw(parameters["eager"])}
        backend = served_by(timers["fastlm"])
        taken = in_turn({**timers, "machine": timed(reading().call)}, rounds, budget=budget)
    ours, own = taken.pop("fastlm"), taken.pop("machine")
    count = sum(shape.numel() for shape in shapes)
    # The gradient is read for its norm, then all is read and all but the gradient written: 4 + 16 + 12 bytes in float32; with a master 2 + 16 + 14.
    work = Work(18 * count, 32 * count)
    return Row(
        "adamw",
        f"{count / 1e6:.3g} million parameters, clipped" + (", with masters" if dtype != "float32" else ""),
        dtype,
        number_of_threads,
        "step",
        backend,
        statistics.median(ours),
        {name: Rival(statistics.median(theirs), Ratio.of(ours, theirs)) for name, theirs in taken.items()},
        share=reading().share(work.bytes, ours, own),
        bound="memory",
        work=work,
    )
