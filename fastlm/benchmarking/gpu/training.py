"""A whole training step on the GPU: fastlm, PyTorch eager or compiled, and the peak memory of each."""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlm
from fastlm.benchmarking.gpu.timing import Call, Row, rows, whole_backends
from fastlm.benchmarking.machine import Work
from fastlm.models import GPT2Config, GPT2LMHeadModel
from fastlm.training.baseline import PlainGPT2

SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}  # GPT-2 124M


def training_step(
    device: str,
    batch: int = 16,
    context: int = 1024,
    sizes: dict[str, int] | None = None,
    compiled: bool = False,
    **options: float,
) -> Iterator[Row]:
    """GPT-2 124M under bfloat16 autocast with AdamW; PyTorch uses SDPA. compiled: by torch.compile, instead of eager.

    Raises:
        RuntimeError: after the rows, if one of the steps failed.
    """
    sizes = sizes or SMALL
    tokens = torch.randint(sizes["vocab_size"], (batch, context), device=device)
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)  # fastlm's model shifts its labels itself

    def step_of(model: nn.Module, loss_of: Callable) -> Call:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")

        def step() -> None:
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    torch.manual_seed(0)
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # type: ignore[arg-type]
    start = GPT2LMHeadModel(config)

    def plain() -> nn.Module:
        return PlainGPT2.like(start).to(device).train()

    def plain_loss(model: nn.Module) -> Tensor:
        return model(tokens, targets).loss

    def ours_on(backend: str | None) -> Call:
        def loss(model: nn.Module) -> Tensor:
            with fastlm.use_backend(backend):
                return model(tokens, labels=tokens).loss

        return step_of(_copy_of(start).to(device).train(), loss)

    backends = whole_backends(device, torch.bfloat16)
    makers: dict[str, Callable[[], Call]] = {"auto": lambda: ours_on(None)}
    makers |= {name: lambda name=name: ours_on(name) for name in backends}  # type: ignore[misc]
    if not compiled:
        makers["eager"] = lambda: step_of(plain(), plain_loss)
    else:
        makers["compiled"] = lambda: step_of(cast(nn.Module, torch.compile(plain())), plain_loss)
    steps: dict[str, Call] = {}
    memory, failed = {}, []
    for name, make in makers.items():
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        try:
            step = make()
            for _ in range(2):
                step()
        except RuntimeError as error:
            failed.append(f"{name}: {' '.join(str(error).split())[:500]}")
            continue
        steps[name] = step
        if device == "cuda":
            memory[name] = torch.cuda.max_memory_allocated() - before
    work = Work(6 * sum(p.numel() for p in start.parameters()) * batch * context, 1)
    shape = f"GPT-2, {sizes['n_layer']} layers of {sizes['n_embd']}, {batch} × {context} tokens"
    for found in rows(steps, ("auto", *backends), "auto", device, work, **options):
        yield Row("training_step", shape, "bfloat16", "step", **found | {"bytes": None, "peak_bytes": memory})
    if failed:
        raise RuntimeError("; ".join(failed))


def _copy_of(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    copy = GPT2LMHeadModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy
