"""Compiles the kernels of a model before its first batch."""

import inspect
from collections.abc import Iterable

import torch
from torch import nn

from fastlm.core.errors import is_iterable, mismatch, shown, wrong_type


def warmup(model: nn.Module, shapes: Iterable[tuple[int, int]]) -> None:
    """Runs the model once per shape, so that later calls do not wait for the compilation of kernels.

    Kernels do not depend on sequence lengths: one shape is enough for each set of features. In training mode with
    gradients enabled, the backward pass runs too. Parameters, their .grad, the model's mode and the state of random
    generators do not change.

    Args:
        model: a model of fastlm.models, or any module that takes token ids as its first argument.
        shapes: (batch, tokens) pairs.

    Raises:
        ValueError: a shape is not a pair of positive integers.
    """
    if not isinstance(model, nn.Module):
        raise wrong_type("model", "a module", model)
    first = next(model.parameters())
    devices = [first.device] if first.is_cuda else []
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    if isinstance(shapes, str | torch.Tensor) or not is_iterable(shapes):
        raise wrong_type("shapes", "(batch, tokens) pairs of positive integers", shapes)
    for shape in shapes:
        if not isinstance(shape, tuple | list) or len(shape) != 2:
            raise wrong_type("shapes", "(batch, tokens) pairs of positive integers", shape)
        for size in shape:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                got = f"({', '.join(map(shown, shape))})"
                raise mismatch("shapes", "(batch, tokens) pairs of positive integers", got)
        tokens = torch.zeros(tuple(shape), dtype=torch.int64, device=first.device)
        with torch.random.fork_rng(devices):
            output = model(tokens, labels=tokens) if takes_labels else model(tokens)
            if model.training and torch.is_grad_enabled():
                if takes_labels:
                    result = output.loss
                else:
                    result = next(iter(output.values())) if isinstance(output, dict) else output
                result = result if torch.is_tensor(result) else result[0]
                trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
                torch.autograd.grad(result.sum(), trainable, allow_unused=True)
