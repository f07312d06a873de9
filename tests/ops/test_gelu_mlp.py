import pytest
import torch
import torch.nn.functional as F

import fastlm
from tests.kernels.support import forward, set_architecture
from tests.support import (
    DTYPES,
    assert_same_bits,
    assert_within_twice_torch,
    error,
    floats,
    on_backends,
    on_every_backend,
    outputs_and_gradients,
)

# (shape of x, hidden width, output width)
SHAPES = [
    ((1, 1), 1, 1),
    ((3, 7), 5, 9),
    ((2, 5, 48), 192, 48),
    ((67, 33), 70, 17),
    ((4, 250), 65, 33),
    ((0, 8), 12, 4),
    ((6,), 24, 5),
]


def inputs_for(shape, hidden, out, layout):
    w1, w2 = floats(hidden, shape[-1]), floats(out, hidden)
    return floats(*shape), *(
        (w1, floats(hidden), w2, floats(out))
        if layout == "linear"
        else (w1.t().contiguous(), floats(hidden), w2.t().contiguous(), floats(out))
    )


def torch_own(approximate, layout):
    def mlp(x, w1, b1, w2, b2):
        w1, w2 = (w1, w2) if layout == "linear" else (w1.t(), w2.t())
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2)

    return mlp


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "approximate, layout, recompute",
    [("none", "linear", 0), ("tanh", "conv1d", 1), ("none", "conv1d", 2), ("tanh", "linear", 0)],
)
@pytest.mark.parametrize("shape, hidden, out", SHAPES, ids=str)
def test_as_close_to_float64_as_torch(shape, hidden, out, approximate, layout, recompute, dtype, backend):
    assert_within_twice_torch(
        lambda *t: fastlm.gelu_mlp(*t, approximate=approximate, layout=layout, recompute=recompute, backend=backend),
        torch_own(approximate, layout),
        inputs_for(shape, hidden, out, layout),
        dtype,
    )


@on_every_backend
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_in_its_tails_and_at_zero(approximate, backend):
    """With one hidden unit: GELU and its derivative alone, including the tails, where erf and tanh saturate."""
    x = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0])])[:, None]
    one = torch.ones(1, 1)
    ours, theirs = (
        outputs_and_gradients(f, (x, one, torch.zeros(1), one, torch.zeros(1)), torch.float32)[:2]
        for f in (
            lambda *t: fastlm.gelu_mlp(*t, approximate=approximate, backend=backend),
            torch_own(approximate, "linear"),
        )
    )
    for a, b in zip(ours, theirs, strict=True):
        # A few units in the last place of the approximations of erf and tanh in float32.
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


@pytest.fixture
def new_memory_holds_nan():
    """Memory of torch.empty is filled, so that an element which a kernel does not write is never right by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_recompute_levels_agree(dtype, backend, new_memory_holds_nan):
    """Only memory and time may differ. In 16 bits the saved input of GELU is also rounded."""
    inputs = inputs_for((40, 24), 96, 24, "linear")
    levels = [
        outputs_and_gradients(lambda *t, r=r: fastlm.gelu_mlp(*t, recompute=r, backend=backend), inputs, dtype)
        for r in (0, 1, 2)
    ]
    for level in levels[1:]:
        for a, b in zip(level, levels[0], strict=True):
            assert a.isfinite().all()
            assert error(a, b.double()) <= {torch.float32: 2**-21, torch.bfloat16: 2**-7}[dtype]


@pytest.mark.parametrize("recompute, kept", [(0, 2), (1, 1), (2, 0)])
@on_every_backend
def test_saved_tensors(recompute, kept, backend):
    """Level `recompute` saves `kept` tensors of the hidden width, in x's dtype."""
    leaves = [t.bfloat16().requires_grad_() for t in inputs_for((10, 6), 30, 7, "linear")]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fastlm.gelu_mlp(*leaves, recompute=recompute, backend=backend)
    hidden = [t for t in saved if t.shape == (10, 30)]
    assert len(hidden) == kept and all(t.dtype == torch.bfloat16 for t in hidden)


@pytest.mark.unsampled
@on_backends("triton")
def test_the_input_of_the_gelu_is_the_vendors_product(backend, monkeypatch):
    """Where no product is fused the bias is added by the product: hidden is rounded once and not written again."""
    set_architecture(monkeypatch.setattr, "sm_90")
    inputs = [t.bfloat16() for t in inputs_for((67, 33), 70, 17, "linear")]
    _, hidden, _ = forward("gelu_mlp", backend, *inputs, "none", "linear", 0)
    assert_same_bits((hidden,), (F.linear(*inputs[:3]),))


@on_every_backend
def test_without_biases(backend):
    x, w1, _, w2, _ = inputs_for((9, 33), 70, 20, "linear")
    for recompute in (0, 2):
        assert_within_twice_torch(
            lambda x, w1, w2, r=recompute: fastlm.gelu_mlp(x, w1, None, w2, None, recompute=r, backend=backend),
            lambda x, w1, w2: F.linear(F.gelu(F.linear(x, w1)), w2),
            (x, w1, w2),
            torch.float32,
        )


@on_every_backend
def test_only_needed_gradients_are_returned(backend):
    inputs = inputs_for((6, 10), 24, 5, "linear")
    whole = outputs_and_gradients(lambda *t: fastlm.gelu_mlp(*t, backend=backend), inputs, torch.float32)[1:]
    for recompute in (0, 1, 2):
        for i, expected in enumerate(whole):
            leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
            fastlm.gelu_mlp(*leaves, recompute=recompute, backend=backend).backward(floats(6, 5))
            torch.testing.assert_close(leaves[i].grad, expected)


@on_every_backend
def test_strided_inputs_give_the_same_results(backend):
    x, w1, b1, w2, b2 = inputs_for((8, 24), 40, 20, "linear")
    variants = [
        (floats(8, 60)[:, 5:29], w1, b1, w2, b2),
        (floats(24, 8).t(), w1, b1, w2, b2),
        (x[:1].expand(8, 24), w1, b1, w2, b2),
        (x, floats(40, 48)[:, ::2], floats(80)[::2], floats(40, 20).t(), floats(40)[::2]),
    ]
    for variant in variants:
        results = []
        for inputs in (variant, [t.contiguous() for t in variant]):
            leaves = [t.detach().requires_grad_() for t in inputs]
            y = fastlm.gelu_mlp(*leaves, recompute=1, backend=backend)
            results.append((y, *torch.autograd.grad(y, leaves, floats(20, 8).t())))
        assert_same_bits(*results)


def call(**changed):
    x, w1, b1, w2, b2 = inputs_for((2, 5), 8, 3, "linear")
    arguments = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2} | changed
    return fastlm.gelu_mlp(
        arguments.pop("x"),
        arguments.pop("w1"),
        arguments.pop("b1"),
        arguments.pop("w2"),
        arguments.pop("b2"),
        **arguments,
    )


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.tensor(1.0)}, r"x: expected at least one dimension, the last of size 1 or more, got \(\)"),
        (
            {"w1": floats(5, 8)},
            r"w1: expected shape \(out, 5\) with layout='linear', 5 being the last dimension of x, got \(5, 8\)",
        ),
        (
            {"w2": floats(3, 9)},
            r"w2: expected shape \(out, 8\) with layout='linear', 8 being the output width of w1, got \(3, 9\)",
        ),
        ({"w1": floats(8, 5).half()}, r"w1: expected torch.float32 on cpu, as x, got torch.float16 on cpu"),
        ({"w2": floats(3, 8).half()}, r"w2: expected torch.float32 on cpu, as x, got torch.float16 on cpu"),
        ({"b1": floats(3)}, r"b1: expected shape \(8,\), the output width of w1, got \(3,\)"),
        ({"b2": floats(8)}, r"b2: expected shape \(3,\), the output width of w2, got \(8,\)"),
        ({"b1": floats(8).double()}, r"b1: expected torch.float32 on cpu, as x, got torch.float64 on cpu"),
        ({"b2": floats(3).double()}, r"b2: expected torch.float32 on cpu, as x, got torch.float64 on cpu"),
        ({"approximate": "erf"}, r"approximate: expected one of 'none', 'tanh', got 'erf'"),
        ({"layout": "row"}, r"layout: expected one of 'linear', 'conv1d', got 'row'"),
        ({"recompute": 3}, r"recompute: expected one of 0, 1, 2, got 3"),
        ({"backend": "gpu"}, r"backend: expected one of cpu, triton, cuda, torch, reference, got 'gpu'"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)
