"""Encoder layers in one compiled call: the bits of the operators that they consist of, on the backend `cpu`."""

import itertools

import pytest
import torch

import fastlm
from fastlm.backends import isa, selection, table
from fastlm.backends.rule import Rule
from fastlm.ops.encoder_layer import Layer, Layers

if not isa.kernels:
    pytest.skip(f"not compiled: {isa.missing}", allow_module_level=True)

from fastlm.ops.encoder_layer.cpu import encode
from tests.support import shrunk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# width, heads, head_dim, hidden width
SIZES = {"odd": (35, 5, 7, 53), "narrow heads": (31, 2, 9, 80), "one head": (1, 1, 1, 1), "wide": (384, 12, 32, 1536)}
STARTS = {"ragged": [0, 1, 1, 6, 23, 40, 40], "equal": [0, 8, 16, 24], "one row": [0, 1], "long": [0, 3, 301]}
ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape)).to(dtype)


def drawn_layer(size, dtype, fused=False, bias=True, activation="gelu", norm_dtype=None):
    width, heads, head_dim, hidden = size
    inner, norm_dtype = heads * head_dim, norm_dtype or dtype

    def projection(inputs, outputs):
        weight = draw(outputs, inputs, dtype=dtype, scale=inputs**-0.5)
        return weight, draw(outputs, dtype=dtype) if bias else None

    def norm():
        return 1 + draw(width, scale=0.1).to(norm_dtype), draw(width, dtype=norm_dtype) if bias else None

    fields = {}
    for name in ("attention_norm", "mlp_norm"):
        fields[name], fields[f"{name}_bias"] = norm()
    for name, sizes in (("output", (inner, width)), ("up", (width, hidden)), ("down", (hidden, width))):
        fields[name], fields[f"{name}_bias"] = projection(*sizes)
    first = [projection(width, 3 * inner)] if fused else [projection(width, inner) for _ in range(3)]
    fields |= {"eps": 1e-5, "num_heads": heads, "head_dim": head_dim, "scale": 0.9 * head_dim**-0.5}
    return Layer.of(first, activation=activation, **fields)


def by_operators(layer, x, starts):
    """The same by the operators, as the modules of a model call them. x: (rows, width)."""
    ends, heads = torch.tensor(starts, dtype=torch.int32), layer.num_heads
    with fastlm.use_backend("cpu"):
        if layer.key is None:
            qkv = fastlm.linear(x, layer.query, layer.query_bias).unflatten(1, (3, heads, -1)).unbind(1)
        else:
            pairs = (
                (layer.query, layer.query_bias),
                (layer.key, layer.key_bias),
                (layer.value, layer.value_bias),
            )
            qkv = [fastlm.linear(x, *pair).unflatten(1, (heads, -1)) for pair in pairs]
        context = fastlm.attention_varlen(*qkv, ends, ends, scale=layer.scale).flatten(1)
        y = fastlm.linear(context, layer.output, layer.output_bias)
        x, _ = fastlm.layernorm_residual(y, x, layer.attention_norm, layer.attention_norm_bias, layer.eps)
        approximate = ACTIVATIONS["gelu_tanh" if layer.activation == 2 else "gelu"]
        weights = layer.up, layer.up_bias, layer.down, layer.down_bias
        y = fastlm.gelu_mlp(x, *weights, approximate=approximate)
        return fastlm.layernorm_residual(y, x, layer.mlp_norm, layer.mlp_norm_bias, layer.eps)[0]


def assert_bits(layers, x, starts):
    expected = x
    for layer in layers:
        expected = by_operators(layer, expected, starts)
    given = x.clone()
    assert torch.equal(encode(Layers.of(layers), given, starts), expected)
    assert torch.equal(given, x)  # it is not written to


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_bits_of_the_operators(name, dtype, threads):
    size = SIZES[name]
    for starts, fused in itertools.product(STARTS.values(), (False, True)):
        if name != "wide" or starts is STARTS["ragged"]:
            assert_bits([drawn_layer(size, dtype, fused)], draw(starts[-1], size[0], dtype=dtype), starts)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_activations_and_biases(activation, bias):
    size, starts = SIZES["odd"], STARTS["ragged"]
    layer = drawn_layer(size, torch.float32, bias=bias, activation=activation)
    assert_bits([layer], draw(starts[-1], size[0]), starts)


def test_norms_in_float32_under_16_bits():
    size, starts = SIZES["odd"], STARTS["ragged"]
    layer = drawn_layer(size, torch.bfloat16, norm_dtype=torch.float32)
    assert_bits([layer], draw(starts[-1], size[0], dtype=torch.bfloat16), starts)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_layers_of_several_sizes_share_the_scratch_memory(dtype):
    sizes = (35, 5, 7, 53), (35, 1, 200, 3), (35, 7, 1, 400), (35, 5, 7, 53)
    layers = [drawn_layer(size, dtype, fused=number % 2 == 1) for number, size in enumerate(sizes)]
    assert_bits(layers, draw(40, 35, dtype=dtype), STARTS["ragged"])


def test_a_batch_keeps_its_shape():
    layer, x = drawn_layer(SIZES["odd"], torch.float32), draw(3, 8, 35)
    y = encode(Layers.of([layer]), x, STARTS["equal"])
    assert torch.equal(y.flatten(0, 1), by_operators(layer, x.flatten(0, 1), STARTS["equal"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_within_twice_that_of_pytorch(dtype):
    """Against float64, on one sequence."""
    layer, x = drawn_layer(SIZES["narrow heads"], dtype), draw(40, 31, dtype=dtype)

    def formula(dtype):
        t = [value.to(dtype) if isinstance(value, torch.Tensor) else value for value in layer]
        own, rows = Layer._make(t), x.to(dtype)
        f = torch.nn.functional
        pairs = (own.query, own.query_bias), (own.key, own.key_bias), (own.value, own.value_bias)
        heads = [f.linear(rows, *pair).unflatten(1, (own.num_heads, -1)).transpose(0, 1) for pair in pairs]
        context = f.scaled_dot_product_attention(*heads, scale=own.scale).transpose(0, 1).flatten(1)
        y = rows + f.linear(context, own.output, own.output_bias)
        rows = f.layer_norm(y, (31,), own.attention_norm, own.attention_norm_bias, own.eps)
        y = rows + f.linear(f.gelu(f.linear(rows, own.up, own.up_bias)), own.down, own.down_bias)
        return f.layer_norm(y, (31,), own.mlp_norm, own.mlp_norm_bias, own.eps)

    exact = formula(torch.float64)

    def error(y):
        return (y.double() - exact).square().mean().sqrt()

    assert error(encode(Layers.of([layer]), x, [0, 40])) <= 2 * error(formula(dtype))


def test_not_a_number_stays_in_its_sequence():
    layer, starts = drawn_layer(SIZES["odd"], torch.float32), STARTS["ragged"]
    x = draw(40, 35)
    clean = encode(Layers.of([layer]), x, starts)
    x[10] = torch.nan
    y = encode(Layers.of([layer]), x, starts)
    assert y[6:23].isnan().all()
    assert torch.equal(y[:6], clean[:6]) and torch.equal(y[23:], clean[23:])


# Backend selection.


def test_selected_as_the_operators_are(monkeypatch):
    layers, x = Layers.of([drawn_layer(SIZES["odd"], torch.float32)]), draw(1, 40, 35)
    for name, selected in (("cpu", True), ("torch", False), ("reference", False)):
        with fastlm.use_backend(name):
            assert layers.are_selected(x, 1) is selected
    rules = ()
    monkeypatch.setattr(table, "without_small_calls", lambda device: rules)
    for operator, selected in (
        ("linear", False),
        ("attention", False),
        ("gelu_mlp", False),
        ("layernorm_residual", True),
        ("rotary", True),
    ):
        rules = (Rule(operator, "float32", {}),)
        selection.forget()
        with fastlm.use_backend(None):
            assert layers.are_selected(x, 1) is selected
            assert not layers.are_selected(x.double(), 1)
            assert (selection.selected_backends() == ["cpu"]) is selected
    selection.forget()


# The compiled function.


def arguments(**changes):
    """Of two layers of two heads of 4 channels and width 8, in float32; the changes are those of the second layer."""
    layers = [drawn_layer((8, 2, 4, 6), torch.float32) for _ in range(2)]
    layers[1] = layers[1]._replace(**{name: value for name, value in changes.items() if name in Layer._fields})
    given = {"x": torch.zeros(5, 8), "y": torch.zeros(5, 8), "scratch": torch.zeros(5, 48)}
    given |= {"statistics": torch.zeros(5, 4), "starts": [0, 2, 5], "threads": 1}
    given |= {"names": Layer._fields, "layers": layers}
    return given | {name: value for name, value in changes.items() if name in given}


WRONG = [
    ({"starts": []}, "starts: expected ascending offsets from 0 to 5, got none"),
    ({"starts": [0, 4]}, "starts: expected ascending offsets from 0 to 5, got 0 to 4"),
    ({"starts": [1, 5]}, "starts: expected ascending offsets from 0 to 5, got 1 to 5"),
    ({"starts": [0, 6, 2, 5]}, "starts: expected ascending offsets from 0 to 5, got 2 after 6"),
    ({"y": torch.zeros(5, 7)}, "y: expected a contiguous tensor of 40 elements, got shape"),
    ({"y": torch.zeros(5, 8).bfloat16()}, "y: expected torch.float32, got torch.bfloat16"),
    ({"x": torch.zeros(8, 5).mT}, "x: expected a contiguous tensor of 40 elements, got shape"),
    ({"x": torch.zeros(5, 8).double()}, "x: expected a dtype that the kernels know, got torch.float64"),
    ({"scratch": torch.zeros(5, 47)}, "scratch: expected a contiguous tensor of 240 elements, got shape"),
    ({"statistics": torch.zeros(5, 3)}, "statistics: expected a contiguous tensor of 20 elements, got shape"),
    ({"query": torch.zeros(8, 7)}, "query: expected 8 inputs and 8 outputs, got shape"),
    ({"query": torch.zeros(8)}, "query: expected 2 dimensions, got 1"),
    ({"key": torch.zeros(4, 8)}, "key: expected 8 inputs and 8 outputs, got shape"),
    ({"key": None}, "value: expected a tensor if key is one, else None, got the other"),
    (
        {"key": None, "value": None},
        "query: expected 3 x 2 x 4 outputs, of projections, heads and head dimension, got shape",
    ),
    ({"num_heads": 0}, "query: expected 1 x 0 x 4 outputs, of projections, heads and head dimension, got shape"),
    ({"num_heads": 3}, "query: expected 1 x 3 x 4 outputs, of projections, heads and head dimension, got shape"),
    ({"head_dim": 2}, "query: expected 1 x 2 x 2 outputs, of projections, heads and head dimension, got shape"),
    (
        {"down": shrunk(8, 6)},
        "down: expected a storage of at least 192 bytes, for its shape and strides, got one of 16",
    ),
    ({"mlp_norm": shrunk(8)}, "mlp_norm: expected a storage of at least 32 bytes, for its shape and strides"),
    ({"output": torch.zeros(8, 4)}, "output: expected 8 inputs and 8 outputs, got shape"),
    ({"output": torch.zeros(8, 16)[:, ::2].mT[::2]}, "output: expected 8 inputs and 8 outputs, got shape"),
    ({"query_bias": torch.zeros(16)[::2]}, "query_bias: expected a contiguous tensor of 8 elements, got shape"),
    ({"up": torch.zeros(6)}, "up: expected 2 dimensions, got 1"),
    ({"down": torch.zeros(8, 5)}, "down: expected 6 inputs and 8 outputs, got shape"),
    ({"down": torch.zeros(8, 6).bfloat16()}, "down: expected torch.float32, got torch.bfloat16"),
    ({"mlp_norm": torch.zeros(7)}, "mlp_norm: expected a contiguous tensor of 8 elements, got shape"),
    ({"mlp_norm": torch.ones(8).bfloat16()}, "mlp_norm: expected torch.float32, got torch.bfloat16"),
    (
        {"mlp_norm_bias": torch.ones(8).half()},
        "mlp_norm_bias: expected torch.float32, as the weight, got torch.float16",
    ),
    ({"activation": 0}, "activation: expected the number of a GELU, got 0"),
    ({"activation": 9}, "activation: expected the number of an activation, got 9"),
    ({"layers": []}, "layers: expected at least one entry, got 0"),
]
WRONG_TYPES = [
    ({"starts": 5}, "starts: expected a list, got int"),
    ({"layers": ()}, "layers: expected a list, got tuple"),
    ({"layers": [(1, 2)]}, "layers: expected tuples of 21, got (1, 2)"),
    ({"names": []}, "names: expected a tuple"),
    ({"up": None}, "up: expected a tensor, got NoneType"),
    ({"eps": "1"}, "eps: expected a number, got str"),
]


@pytest.mark.parametrize("changes, message", WRONG, ids=[message for _, message in WRONG])
def test_errors_name_the_argument(changes, message):
    given = arguments(**changes)
    written = [given[name].fill_(7) for name in ("y", "scratch", "statistics")]
    with pytest.raises(ValueError) as caught:
        isa.kernels.encoder_layers(**given)
    assert str(caught.value).startswith(message)
    assert all((tensor == 7).all() for tensor in written)  # nothing has run, though the first layer is right


@pytest.mark.parametrize("changes, message", WRONG_TYPES, ids=[message for _, message in WRONG_TYPES])
def test_wrong_types(changes, message):
    with pytest.raises(TypeError) as caught:
        isa.kernels.encoder_layers(**arguments(**changes))
    assert str(caught.value).startswith(message)


def test_the_valid_call_of_these():
    given = arguments()
    given["y"].fill_(torch.nan)
    isa.kernels.encoder_layers(**given)
    assert given["y"].isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [(35, 5, 7, 53), (35, 1, 200, 3), (35, 1, 2, 400), (350, 1, 3, 7)], ids=str)
def test_nothing_is_written_beside_the_tensors_of_a_call(size, fused):
    """Of sizes for which queries, hidden layer or residual sum are the largest part of the scratch memory."""
    layers, rows, guard = Layers.of([drawn_layer(size, torch.float32, fused)]), 5, 64
    widths = {"y": size[0], "scratch": layers.scratch_width, "statistics": layers.statistics_width}
    whole = {name: torch.full((rows * width + 2 * guard,), 7.0) for name, width in widths.items()}
    given = arguments(x=draw(rows, size[0]), layers=layers.layers)
    given |= {name: values[guard:-guard].view(rows, -1) for name, values in whole.items()}
    isa.kernels.encoder_layers(**given)
    for values in whole.values():
        assert (values[:guard] == 7).all() and (values[-guard:] == 7).all()
    assert torch.equal(given["y"], by_operators(layers.layers[0], given["x"], given["starts"]))


def test_no_rows():
    given = arguments(starts=[0, 0]) | {name: torch.zeros(0, 8) for name in ("x", "y", "scratch", "statistics")}
    isa.kernels.encoder_layers(**given)
