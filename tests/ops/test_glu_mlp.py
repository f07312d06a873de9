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

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
# (shape of x, hidden width, output width). The largest of many errors is compared: of a single number, PyTorch's own
# may be 0 by chance.
SHAPES = [
    ((40, 1), 30, 20),
    ((3, 7), 5, 9),
    ((2, 5, 48), 192, 48),
    ((67, 33), 70, 17),
    ((4, 250), 65, 33),
    ((0, 8), 12, 4),
    ((60,), 144, 35),
]
# Several panels of columns and several blocks of k.
LARGE = [((130, 450), 110, 40), ((40, 70), 820, 30)]


def inputs_for(shape, hidden, out):
    """x, the weights of gate, up and down, and their biases."""
    w_gate, w_up = floats(2, hidden, shape[-1]) / shape[-1] ** 0.5
    b_gate, b_up = floats(2, hidden)
    return floats(*shape), w_gate, w_up, floats(out, hidden) / hidden**0.5, b_gate, b_up, floats(out)


def torch_own(activation):
    def mlp(x, w_gate, w_up, w_down, b_gate=None, b_up=None, b_down=None):
        gate, up = F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up)
        return F.linear(ACTIVATIONS[activation](gate) * up, w_down, b_down)

    return mlp


@pytest.mark.unsampled
@on_backends("triton")
def test_gate_and_up_are_the_vendors_products(backend, monkeypatch):
    """Where no product is fused the biases are added by the products: gate and up are not written again."""
    set_architecture(monkeypatch.setattr, "sm_90")
    x, w_gate, w_up, w_down, b_gate, b_up, b_down = (t.bfloat16() for t in inputs_for((67, 33), 70, 17))
    inputs = x, w_gate, w_up, w_down, b_gate, b_up, b_down
    _, gate, up, _ = forward("glu_mlp", backend, *inputs, "silu", 1)
    assert_same_bits((gate, up), (F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up)))


@pytest.mark.unsampled
@on_backends("triton")
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_pointwise_kernels_beside_the_vendors_products(recompute, backend, monkeypatch):
    set_architecture(monkeypatch.setattr, "sm_90")
    assert_within_twice_torch(
        lambda *t: fastlm.glu_mlp(*t, recompute=recompute, backend=backend),
        torch_own("silu"),
        inputs_for((67, 33), 70, 17),
        torch.bfloat16,
    )


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation, recompute", [("silu", 0), ("gelu", 1), ("gelu_tanh", 2), ("relu", 1)])
@pytest.mark.parametrize("shape, hidden, out", SHAPES, ids=str)
def test_as_close_to_float64_as_torch(shape, hidden, out, activation, recompute, dtype, backend):
    assert_within_twice_torch(
        lambda *t: fastlm.glu_mlp(*t, activation=activation, recompute=recompute, backend=backend),
        torch_own(activation),
        inputs_for(shape, hidden, out),
        dtype,
    )


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, hidden, out", LARGE, ids=str)
def test_large_products_are_as_close_to_float64_as_torch(shape, hidden, out, dtype, backend):
    assert_within_twice_torch(
        lambda *t: fastlm.glu_mlp(*t, backend=backend), torch_own("silu"), inputs_for(shape, hidden, out), dtype
    )


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_every_size_is_one(recompute, dtype, backend):
    """Of positive numbers, so that nothing cancels: the result and the gradients are rounded at most five times."""
    inputs = [torch.full(shape, 0.3 + i / 7).to(dtype) for i, shape in enumerate(((1, 1),) * 4 + ((1,),) * 3)]
    ours = outputs_and_gradients(lambda *t: fastlm.glu_mlp(*t, recompute=recompute, backend=backend), inputs, dtype)
    truths = outputs_and_gradients(torch_own("silu"), [x.double() for x in inputs], torch.float64, dtype)
    assert all(error(a, truth) <= 5 * torch.finfo(dtype).eps / 2 for a, truth in zip(ours, truths, strict=True))


@on_every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_in_their_tails_and_at_zero(activation, backend):
    """With one hidden unit: the activation and its derivative alone, including the tails, where they saturate."""
    x = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0, 200, -200])])
    x, one, zero = x[:, None].requires_grad_(), torch.ones(1, 1), torch.zeros(1, 1)
    # up x is its bias, 1.
    y = fastlm.glu_mlp(x, one, zero, one, None, torch.ones(1), activation=activation, backend=backend)
    wide = x.detach().double().requires_grad_()
    truth = ACTIVATIONS[activation](wide)
    (gradient,), (true_gradient,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(truth.sum(), wide)
    # A few units in the last place of the approximations of exp, erf and tanh in float32. PyTorch's gradient of the
    # tanh GELU is off by 1e-6 where 1 + tanh cancels.
    torch.testing.assert_close(y.double(), truth, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=2e-6, atol=2e-6)


@on_every_backend
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_relu_passes_no_gradient_where_its_slope_is_0(recompute, backend):
    """Also beside an infinite up, as in PyTorch: a zero times infinity would be NaN in every gradient of the row."""
    x, w_gate, w_up, w_down, b_gate, b_up, b_down = inputs_for((5, 12), 20, 6)
    b_gate[3], b_up[3] = -1000, torch.inf
    inputs = x, w_gate, w_up, w_down, b_gate, b_up, b_down
    options = {"activation": "relu", "recompute": recompute, "backend": backend}
    ours = outputs_and_gradients(lambda *t: fastlm.glu_mlp(*t, **options), inputs, torch.float32)
    theirs = outputs_and_gradients(torch_own("relu"), inputs, torch.float32)
    assert theirs[1].isfinite().all()
    for a, b in zip(ours[1:4], theirs[1:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@on_every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_in_the_gate_reaches_the_result(activation, backend):
    one = torch.ones(1, 1)
    y = fastlm.glu_mlp(one, one, one, one, torch.tensor([torch.nan]), activation=activation, backend=backend)
    assert y.isnan()


@on_backends("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("rows, width, hidden", [(1, 40, 50), (20, 500, 300), (70, 33, 7), (600, 450, 820)], ids=str)
def test_gate_and_up_have_the_bits_of_linear(rows, width, hidden, mixed, dtype, backend):
    """The product with both weights sums in the same order as the product with one. They may differ in layout."""
    x, w_gate, w_up, w_down, b_gate, b_up, _ = (t.to(dtype) for t in inputs_for((rows, width), hidden, 5))
    w_up = w_up.t().contiguous().t() if mixed else w_up
    results = forward("glu_mlp", backend, x, w_gate, w_up, w_down, b_gate, b_up, None, "silu", 1)
    expected = fastlm.linear(x, w_gate, b_gate, backend=backend), fastlm.linear(x, w_up, b_up, backend=backend)
    assert_same_bits(results[1:3], expected)


@pytest.fixture
def new_memory_holds_nan():
    """Memory of torch.empty is filled, so that an element which a kernel does not write is never right by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_recompute_levels_agree(dtype, backend, new_memory_holds_nan):
    """Only memory and time may differ. In 16 bits the saved inputs of the activation are also rounded."""
    inputs = inputs_for((40, 24), 96, 24)
    levels = [
        outputs_and_gradients(lambda *t, r=r: fastlm.glu_mlp(*t, recompute=r, backend=backend), inputs, dtype)
        for r in (0, 1, 2)
    ]
    for level in levels[1:]:
        for a, b in zip(level, levels[0], strict=True):
            assert a.isfinite().all()
            assert error(a, b.double()) <= {torch.float32: 2**-21, torch.bfloat16: 2**-7}[dtype]


@pytest.mark.parametrize("recompute, kept", [(0, 3), (1, 2), (2, 0)])
@on_every_backend
def test_saved_tensors(recompute, kept, backend):
    """Level `recompute` saves `kept` tensors of the hidden width, in x's dtype."""
    leaves = [t.bfloat16().requires_grad_() for t in inputs_for((10, 6), 30, 7)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fastlm.glu_mlp(*leaves, recompute=recompute, backend=backend)
    hidden = [t for t in saved if t.shape == (10, 30)]
    assert len(hidden) == kept and all(t.dtype == torch.bfloat16 for t in hidden)


@on_every_backend
def test_a_graph_can_be_differentiated_twice(backend):
    """The backward pass writes into nothing that it saved."""
    leaves = [t.requires_grad_() for t in inputs_for((10, 6), 30, 7)]
    for recompute in (0, 1, 2):
        y = fastlm.glu_mlp(*leaves, recompute=recompute, backend=backend)
        first, second = (torch.autograd.grad(y.sum(), leaves, retain_graph=True) for _ in range(2))
        assert_same_bits(first, second)


@on_every_backend
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_without_biases(recompute, backend):
    inputs = inputs_for((9, 33), 70, 20)[:4]
    assert_within_twice_torch(
        lambda *t: fastlm.glu_mlp(*t, recompute=recompute, backend=backend), torch_own("silu"), inputs, torch.float32
    )


@on_every_backend
@pytest.mark.parametrize("without", ["b_gate", "b_up", "b_down"])
def test_without_one_of_the_biases(without, backend):
    names = ("x", "w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")
    given = dict(zip(names, inputs_for((9, 33), 70, 20), strict=True))
    given.pop(without)
    assert_within_twice_torch(
        lambda *t: fastlm.glu_mlp(**dict(zip(given, t, strict=True)), backend=backend),
        lambda *t: torch_own("silu")(**dict(zip(given, t, strict=True))),
        tuple(given.values()),
        torch.float32,
    )


@on_every_backend
def test_only_needed_gradients_are_returned(backend):
    inputs = inputs_for((6, 10), 24, 5)
    whole = outputs_and_gradients(lambda *t: fastlm.glu_mlp(*t, backend=backend), inputs, torch.float32)[1:]
    for recompute in (0, 1, 2):
        for i, expected in enumerate(whole):
            leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
            fastlm.glu_mlp(*leaves, recompute=recompute, backend=backend).backward(floats(6, 5))
            torch.testing.assert_close(leaves[i].grad, expected)


@on_every_backend
def test_strided_inputs_give_the_same_results(backend):
    x, w_gate, w_up, w_down, b_gate, b_up, b_down = inputs_for((8, 24), 40, 20)
    both = floats(80, 24)
    variants = [
        (floats(8, 60)[:, 5:29], w_gate, w_up, w_down, b_gate, b_up, b_down),
        (floats(24, 8).t(), w_gate, w_up, w_down, b_gate, b_up, b_down),
        (x[:1].expand(8, 24), w_gate, w_up, w_down, b_gate, b_up, b_down),
        (x, *both.chunk(2), w_down, *floats(80).chunk(2), b_down),
        (x, *both.t().contiguous().t().chunk(2), w_down, b_gate, b_up, b_down),
        (x, w_gate, floats(24, 40).t(), floats(40, 20).t(), b_gate, b_up, b_down),
        (x, floats(40, 48)[:, ::2], w_up, w_down, floats(80)[::2], b_up, floats(40)[::2]),
    ]
    for variant in variants:
        results = []
        for inputs in (variant, [t.contiguous() for t in variant]):
            leaves = [t.detach().requires_grad_() for t in inputs]
            y = fastlm.glu_mlp(*leaves, backend=backend)
            results.append((y, *torch.autograd.grad(y, leaves, floats(20, 8).t())))
        assert_same_bits(*results)


@on_every_backend
def test_two_halves_of_one_weight_get_its_gradient(backend):
    x, _, _, w_down, *_ = inputs_for((8, 24), 40, 20)
    inputs = x, floats(80, 24) / 5, w_down
    assert_within_twice_torch(
        lambda x, both, w_down: fastlm.glu_mlp(x, *both.chunk(2), w_down, backend=backend),
        lambda x, both, w_down: torch_own("silu")(x, *both.chunk(2), w_down),
        inputs,
        torch.float32,
    )


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_as_the_mlp_of_transformers(name, dtype, backend):
    transformers = pytest.importorskip("transformers")
    module = getattr(getattr(transformers.models, name.lower()), f"modeling_{name.lower()}")
    config = getattr(transformers, f"{name}Config")(hidden_size=64, intermediate_size=112)
    mlp = getattr(module, f"{name}MLP")(config)
    weights = [layer.weight.detach().clone() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    names = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    activation = {"Llama": "silu", "Gemma2": "gelu_tanh"}[name]
    assert_within_twice_torch(
        lambda *t: fastlm.glu_mlp(*t, activation=activation, backend=backend),
        lambda x, *weights: torch.func.functional_call(mlp, dict(zip(names, weights, strict=True)), (x,)),
        (floats(2, 9, 64), *(20 * w for w in weights)),  # initialised so small that the activation would be linear
        dtype,
    )


def call(**changed):
    names = ("x", "w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")
    return fastlm.glu_mlp(**dict(zip(names, inputs_for((2, 5), 8, 3), strict=True)) | changed)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.tensor(1.0)}, r"x: expected at least one dimension, the last of size 1 or more, got \(\)"),
        ({"w_gate": floats(5, 8)}, r"w_gate: expected shape \(out, 5\) .*the last dimension of x, got \(5, 8\)"),
        ({"w_up": floats(7, 5)}, r"w_up: expected shape \(8, 5\), as w_gate, got \(7, 5\)"),
        ({"w_down": floats(3, 9)}, r"w_down: expected shape \(out, 8\) .*the output width of w_gate, got \(3, 9\)"),
        ({"w_gate": floats(8, 5).half()}, r"w_gate: expected torch.float32 on cpu, as x, got torch.float16 on cpu"),
        ({"w_up": floats(8, 5).half()}, r"w_up: expected torch.float32 on cpu, as x, got torch.float16 on cpu"),
        ({"w_down": floats(3, 8).half()}, r"w_down: expected torch.float32 on cpu, as x, got torch.float16 on cpu"),
        ({"b_gate": floats(3)}, r"b_gate: expected shape \(8,\), the output width of w_gate, got \(3,\)"),
        ({"b_up": floats(3)}, r"b_up: expected shape \(8,\), the output width of w_up, got \(3,\)"),
        ({"b_down": floats(8)}, r"b_down: expected shape \(3,\), the output width of w_down, got \(8,\)"),
        ({"b_gate": floats(8).double()}, r"b_gate: expected torch.float32 on cpu, as x, got torch.float64 on cpu"),
        ({"b_up": floats(8).double()}, r"b_up: expected torch.float32 on cpu, as x, got torch.float64 on cpu"),
        ({"b_down": floats(3).double()}, r"b_down: expected torch.float32 on cpu, as x, got torch.float64 on cpu"),
        (
            {"activation": "swish"},
            r"activation: expected one of 'silu', 'gelu', 'gelu_tanh', 'relu', got 'swish'",
        ),
        ({"activation": "gelu_tan"}, r"got 'gelu_tan'; did you mean 'gelu_tanh'\?"),
        ({"recompute": 3}, r"recompute: expected one of 0, 1, 2, got 3"),
        ({"w_up": None}, r"w_up: expected a tensor, got None"),
        ({"backend": "gpu"}, r"backend: expected one of cpu, triton, cuda, torch, reference, got 'gpu'"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)
