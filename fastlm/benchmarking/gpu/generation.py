"""Generation with GPT-2 on the GPU: by CUDA graphs, launched step by step, and PyTorch eager with a KV cache."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastlm
from fastlm.benchmarking.gpu.timing import Row, rows, whole_backends
from fastlm.benchmarking.gpu.training import SMALL
from fastlm.benchmarking.machine import Work
from fastlm.models import GPT2Config, GPT2LMHeadModel
from fastlm.training.baseline import PlainGPT2


def generation(
    device: str,
    batch: int,
    prompt: int = 128,
    new_tokens: int = 128,
    sizes: dict[str, int] | None = None,
    **options: float,
) -> Iterator[Row]:
    """GPT-2 124M in bfloat16, greedy. Bytes: the weights and the KV cache, read once per step."""
    sizes = sizes or SMALL
    torch.manual_seed(0)
    start = GPT2LMHeadModel(GPT2Config(**sizes))  # type: ignore[arg-type]
    plain = PlainGPT2.like(start).to(device, torch.bfloat16).eval()
    model = start.to(device, torch.bfloat16).eval()
    tokens = torch.randint(sizes["vocab_size"], (batch, prompt), device=device)

    def ours(backend: str | None = None, cuda_graphs: bool = True) -> Tensor:
        with fastlm.use_backend(backend):
            return model.generate(tokens, new_tokens, eos_token_id=(), cuda_graphs=cuda_graphs)

    @torch.inference_mode()
    def eager() -> Tensor:
        return plain.generate(tokens, new_tokens)

    backends = whole_backends(device, torch.bfloat16)
    calls: dict[str, Callable[[], Tensor]] = {
        "auto": ours,
        **{name: functools.partial(ours, name) for name in backends},
    }
    calls |= {"step by step": functools.partial(ours, None, False), "eager": eager}
    parameters = sum(p.numel() for p in model.parameters())
    cached = 2 * sizes["n_layer"] * sizes["n_embd"] * batch * sum(range(prompt, prompt + new_tokens))
    work = Work(2 * parameters * batch * (prompt + new_tokens), 2 * (parameters * new_tokens + cached))
    shape = f"GPT-2, {sizes['n_layer']} layers of {sizes['n_embd']}, {batch} × ({prompt} + {new_tokens}) tokens"
    for found in rows(calls, ("auto", *backends), "auto", device, work, **options):
        yield Row("generation", shape, "bfloat16", "greedy", **found)
