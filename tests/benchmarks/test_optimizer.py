import pytest
import torch

from fastlm.benchmarking import optimizer
from fastlm.benchmarking.machine import Probe
from fastlm.benchmarking.measure import timed

SHAPES = [torch.Size((30, 20)), torch.Size((7,))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rival_takes_the_same_steps(dtype):
    """Clipping and, in 16 bits, master weights included."""
    starts = [torch.randn(shape).to(getattr(torch, dtype)) for shape in SHAPES]
    gradients = [torch.randn(shape).to(getattr(torch, dtype)) for shape in SHAPES]
    ends = []
    for make in (optimizer.adamw, optimizer.torch_adamw):
        parameters = [p.clone().requires_grad_() for p in starts]
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.clone()
        timer = make(parameters)
        timer()
        if dtype == "float32":  # PyTorch's clipping rewrites the gradients
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad.copy_(gradient)
        timer()
        ends.append([p.detach() for p in parameters])
    for a, b, start in zip(*ends, starts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == "float32" else 2**-7, atol=1e-6)
        assert not torch.equal(a, start)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row(dtype, monkeypatch):
    probe = Probe(lambda: None, 1e7)
    monkeypatch.setattr(optimizer, "reading", lambda: probe)
    monkeypatch.setattr(optimizer, "timed", lambda call: (lambda: 0.01) if call is probe.call else timed(call))
    row = optimizer.compare_adamw(dtype, 1, shapes=SHAPES, rounds=5)
    assert (
        row.operator == "adamw"
        and row.direction == "step"
        and list(row.rivals) == ["eager"]
        and row.backend in ("cpu", "torch")
    )
    assert row.share == pytest.approx(32 * 607 / 1e9 / row.seconds)


def test_the_shapes_are_gpt2s():
    assert sum(shape.numel() for shape in optimizer.gpt2_shapes()) == 124_439_808
