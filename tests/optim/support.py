"""Parameters, gradients and steps of the tests of AdamW."""

import torch

from tests.support import error, floats

# One element, less and more than a vector register, more than one chunk of the kernel's work (16384 elements), and no
# elements. Some chunks begin within a tensor.
SHAPES = [(3,), (50, 70), (1,), (16384 + 5,), (0,), (), (129, 257), (2, 3, 4)]
HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def parameters(shapes=SHAPES, dtype=torch.float32):
    return [floats(*shape).to(dtype).requires_grad_() for shape in shapes]


def gradients(shapes, number, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + number)
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


def steps(optimizer, count, first=0, scale=1.0):
    """Make `count` updates. The gradients depend only on the number of the step and the shapes."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for i in range(first, first + count):
        for p, gradient in zip(own, gradients([p.shape for p in own], i, scale), strict=True):
            p.grad = gradient.to(p.dtype)
        optimizer.step()
    return [p.detach() for p in own]


def same_start(own, dtype):
    return [p.detach().to(dtype, copy=True).requires_grad_() for p in own]


def moments(optimizer, own):
    return [optimizer.state[p][key] for p in own for key in ("exp_avg", "exp_avg_sq")]


def close(ours, theirs):
    """Check that float32 tensors differ at most by a few roundings."""
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b.double()) <= 2**-21
