"""Compile what a model will need before the first batch waits for it."""

import inspect
from collections.abc import Iterable

import torch
from torch import nn


def warmup(model: nn.Module, shapes: Iterable[tuple[int, int]]) -> None:
    """Run the model once at each shape, so that no later call of that kind waits for a kernel to be compiled. (Kernels do not depend on lengths: one shape
    is enough for each set of features, and a second one costs little.)

    In train mode with gradients on, the backward pass runs too. The model's parameters, their .grad, its mode and the random number generators are as before.

    Args:
        model: one of fastlm.models, or any module that takes token ids as its first argument.
        shapes: (batch, tokens) of each.

    Raises:
        ValueError: a shape that is not two positive integers.
    """
    first = next(model.parameters())
    devices = [first.device] if first.is_cuda else []
    labelled = "labels" in inspect.signature(model.forward).parameters
    for shape in shapes:
        if len(tuple(shape)) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"shapes: expected (batch, tokens), two positive integers each, got {shape}")
        tokens = torch.zeros(tuple(shape), dtype=torch.int64, device=first.device)
        with torch.random.fork_rng(devices):
            output = model(tokens, labels=tokens) if labelled else model(tokens)
            if model.training and torch.is_grad_enabled():
                result = (
                    output.loss if labelled else next(iter(output.values())) if isinstance(output, dict) else output
                )
                result = result if torch.is_tensor(result) else result[0]
                wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
                torch.autograd.grad(result.sum(), wanted, allow_unused=True)
