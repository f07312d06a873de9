"""GPT-2 as a whole on the GPU: a training step and generation by each backend, and by plain PyTorch."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

import fastlm
from fastlm.benchmarking.compare import Row
from fastlm.benchmarking.gpu.timing import Call, rows, whole_backends
from fastlm.benchmarking.machine import Work
from fastlm.models.bench import generator
from fastlm.training.baseline import PlainGPT2
from fastlm.training.bench import MODELS, Subject, baseline_generate
from fastlm.training.whole import Loss

STEP = dataclasses.replace(MODELS["gpt2"], batch=16, context=1024)


def training_step(device: str, subject: Subject = STEP, compiled: bool = False, **options: Any) -> Iterator[Row]:
    """A GPT-2 under bfloat16 autocast with AdamW; PyTorch uses SDPA. compiled: by torch.compile, instead of eager.

    Raises:
        RuntimeError: after the rows, if one of the steps failed.
    """
    inputs, targets = (x.to(device) for x in subject.pairs())
    start = subject.model()

    def step_of(model: nn.Module, loss: Loss, backend: str | None = None) -> Call:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")

        def step() -> None:
            with torch.autocast(device, torch.bfloat16), fastlm.use_backend(backend):
                found = loss(model, inputs, targets)
            found.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def ours(backend: str | None) -> Call:
        return step_of(subject.model().to(device).train(), subject.objective().loss, backend)

    def plain() -> Call:
        model = PlainGPT2.like(start).to(device).train()
        return step_of(cast(nn.Module, torch.compile(model)) if compiled else model, PlainGPT2.loss)

    backends = whole_backends(device, torch.bfloat16)
    makers: dict[str, Callable[[], Call]] = {name: functools.partial(ours, name) for name in backends}
    makers = {"auto": lambda: ours(None), **makers, "compiled" if compiled else "eager": plain}
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
    described = {
        "operator": "training_step",
        "shape": str(subject),
        "dtype": "bfloat16",
        "direction": "step",
        "work": Work(6 * sum(p.numel() for p in start.parameters()) * inputs.numel(), 0),
    }
    yield from rows(steps, ("auto", *backends), "auto", device, described, memory, **options)
    if failed:
        raise RuntimeError("; ".join(failed))


def generation(
    device: str,
    batch: int,
    prompt: int = 128,
    new_tokens: int = 128,
    sizes: dict[str, int] | None = None,
    **options: Any,
) -> Iterator[Row]:
    """GPT-2 124M in bfloat16, greedy: by CUDA graphs, launched step by step, and PyTorch eager with a KV cache.

    Bytes: the weights and the KV cache, read once per step.
    """
    model = generator("gpt2", torch.bfloat16, sizes).to(device)
    config: Any = model.config
    plain = baseline_generate("gpt2", model)
    tokens = torch.randint(config.vocab_size, (batch, prompt), device=device)

    def ours(backend: str | None = None, cuda_graphs: bool = True) -> Tensor:
        with fastlm.use_backend(backend):
            return model.generate(tokens, new_tokens, eos_token_id=(), cuda_graphs=cuda_graphs)

    backends = whole_backends(device, torch.bfloat16)
    calls: dict[str, Callable[[], Tensor]] = {
        "auto": ours,
        **{name: functools.partial(ours, name) for name in backends},
        "step by step": functools.partial(ours, None, False),
        "eager": torch.inference_mode()(lambda: plain(tokens, new_tokens)),
    }
    parameters = sum(p.numel() for p in model.parameters())
    cached = 2 * config.n_layer * config.n_embd * batch * sum(range(prompt, prompt + new_tokens))
    described = {
        "operator": "generation",
        "shape": f"GPT-2, {config.n_layer} layers of {config.n_embd}, {batch} × ({prompt} + {new_tokens}) tokens",
        "dtype": "bfloat16",
        "direction": "greedy",
        "work": Work(2 * parameters * batch * (prompt + new_tokens), 2 * (parameters * new_tokens + cached)),
    }
    yield from rows(calls, ("auto", *backends), "auto", device, described, **options)
