"""Encoders whose layers run in one compiled call: the bits of the modules, which run where something needs them."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from fastlm.backends import isa
from fastlm.models import encode_layers
from fastlm.models.encoder import EncoderModel
from fastlm.models.encoder_layer import EncoderLayer, part
from tests.models.hugging_face import encoder_like, tiny_encoder
from tests.support import recorded_calls

pytestmark = pytest.mark.skipif(not isa.kernels, reason=f"not compiled: {isa.missing}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COMPILED = ["Bert", "Roberta", "XLMRoberta", "DistilBert", "Electra"]
BY_MODULES = ["MPNet", "ModernBert", "Gte", "NomicBert", "EuroBert"]
RIGHT = torch.arange(17) < torch.tensor([17, 5, 1])[:, None]
MASKS = {"none": None, "right": RIGHT, "left": RIGHT.flip(1), "all": torch.ones(3, 17, dtype=torch.bool)}


@pytest.fixture
def compiled_calls(monkeypatch):
    """The calls of the layers' compiled function."""
    return recorded_calls(monkeypatch, encode_layers, "encode")


@pytest.fixture(autouse=True)
def on_cpu_kernels():
    """On every CPU, whatever its table selects."""
    with fastlm.use_backend("cpu"):
        yield


def tiny(family="Bert", dtype=torch.float32, suffix="Model", **changes):
    torch.manual_seed(0)
    return encoder_like(tiny_encoder(family, suffix, **changes)).to(dtype)


def layers_of(model):
    base = model.base_model
    return part(base, base.config.layout.layers)


def ids(batch=3):
    return torch.randint(5, 131, (batch, 17), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def hidden(model, mask=None, **inputs):
    return model(ids(), mask, **inputs).last_hidden_state


def nothing(*_):
    pass


def by_modules(model, *arguments, **inputs):
    """The same, computed by the modules: one of them has a hook."""
    hook = layers_of(model)[-1].register_forward_hook(nothing)
    try:
        return hidden(model, *arguments, **inputs)
    finally:
        hook.remove()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", COMPILED)
def test_bits_of_the_modules(family, dtype, compiled_calls):
    model, threads = tiny(family, dtype), torch.get_num_threads()
    try:
        for number_of_threads, mask in zip((1, 2, 1, 2), MASKS.values(), strict=True):
            torch.set_num_threads(number_of_threads)
            compiled_calls.clear()
            found = hidden(model, mask)
            assert len(compiled_calls) == 1
            expected = by_modules(model, mask)
            assert len(compiled_calls) == 1
            assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_activations(activation, compiled_calls):
    model = tiny(hidden_act=activation)
    assert torch.equal(hidden(model, RIGHT), by_modules(model, RIGHT)) and len(compiled_calls) == 1


def test_sequences_that_a_caller_has_packed(compiled_calls):
    model, ends = tiny(), torch.tensor([0, 3, 17, 34, 40, 51])
    found = hidden(model, cu_seqlens=ends)
    assert torch.equal(found, by_modules(model, cu_seqlens=ends)) and len(compiled_calls) == 1
    assert not torch.equal(found, hidden(model))


def test_heads_and_inference_mode(compiled_calls):
    model = tiny(suffix="ForSequenceClassification")
    expected = model(ids(), RIGHT).logits.detach()
    assert not compiled_calls
    with torch.inference_mode():
        assert torch.equal(model(ids(), RIGHT).logits, expected)
    assert len(compiled_calls) == 1


@pytest.mark.parametrize("family", BY_MODULES)
def test_other_layers_run_by_modules(family, compiled_calls):
    assert hidden(tiny(family), RIGHT).isfinite().all()
    assert not compiled_calls


def test_the_layers_are_described_once(monkeypatch):
    model, described, own = tiny(), [], EncoderLayer.describe
    monkeypatch.setattr(EncoderLayer, "describe", lambda self: (described.append(self), own(self))[1])
    for _ in range(3):
        hidden(model)
    assert described == [*layers_of(model)]
    layers_of(model)[1].scale *= 2
    hidden(model)
    assert len(described) == 6


# What a user may do to a model; the modules run then, or the compiled calls follow.


def replace_weight(model):
    projection = layers_of(model)[1].output.dense
    projection.weight = nn.Parameter(projection.weight * 2)


def change_data(model):
    projection = layers_of(model)[1].attention.self.query
    projection.weight.data = projection.weight.data * 2


def change_in_place(model):
    layers_of(model)[1].attention.self.key.weight.mul_(2)


def strided_weight(model):
    """No stride is 1: the kernels take a copy."""
    projection = layers_of(model)[1].attention.self.key
    values = torch.zeros(96, 96)
    values[::2, ::2] = 2 * projection.weight
    projection.weight = nn.Parameter(values[::2, ::2])


def replace_module(model):
    torch.manual_seed(2)
    layers_of(model)[0].output.dense = nn.Linear(80, 48)


def replace_layer(model):
    layers_of(model)[2] = copy.deepcopy(layers_of(model)[1])


def remove_layer(model):
    del layers_of(model)[2]
    model.kinds.pop()


def replace_forward(model):
    norm = layers_of(model)[1].output.LayerNorm
    own = norm.forward
    norm.forward = lambda *arguments: tuple(2 * y for y in own(*arguments))


def change_class(model):
    norm = layers_of(model)[1].output.LayerNorm

    class Doubled(type(norm)):
        def forward(self, *arguments):
            return tuple(2 * y for y in super().forward(*arguments))

    norm.__class__ = Doubled


def add_hook(model):
    layers_of(model)[1].output.LayerNorm.register_forward_hook(lambda module, inputs, output: (output[0] * 2, None))


def add_pre_hook(model):
    layers_of(model)[1].attention.self.query.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def set_attribute(model):
    layers_of(model)[1].scale *= 2


def set_epsilon(model):
    layers_of(model)[1].output.LayerNorm.eps = 0.5


def remove_bias(model):
    layers_of(model)[0].output.dense.bias = None


def parametrize(model):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layers_of(model)[1].attention.self.value, "weight", Twice())


class TwiceAsLarge(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 2 * self.module(x)


def wrap(model):
    """As adapters are put into a model."""
    layers_of(model)[1].attention.self.query = TwiceAsLarge(layers_of(model)[1].attention.self.query)


CHANGES = (
    replace_weight,
    change_data,
    change_in_place,
    strided_weight,
    replace_module,
    replace_layer,
    remove_layer,
    replace_forward,
    change_class,
    add_hook,
    add_pre_hook,
    set_attribute,
    set_epsilon,
    remove_bias,
    parametrize,
    wrap,
)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after a call"])
def test_a_changed_model_is_not_computed_as_it_was(change, used):
    changed, expected = tiny(), tiny()
    unchanged = hidden(tiny(), RIGHT)
    if used:
        hidden(changed, RIGHT)
    change(changed), change(expected)
    found = hidden(changed, RIGHT)
    assert torch.equal(found, by_modules(expected, RIGHT))
    assert not torch.equal(found, unchanged)


@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after a call"])
def test_a_replaced_forward_of_a_class_is_called(used, monkeypatch):
    model, own = tiny(), EncoderLayer.forward
    unchanged = hidden(tiny())
    if used:
        hidden(model)

    def forward(self, *arguments):
        x, residual = own(self, *arguments)
        return 2 * x, residual

    monkeypatch.setattr(EncoderLayer, "forward", forward)
    assert torch.equal(hidden(model), by_modules(model)) and not torch.equal(hidden(model), unchanged)


@pytest.mark.parametrize("context", [torch.enable_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_modules_run_under_gradients_and_autocast(context, compiled_calls):
    model = tiny().requires_grad_(False)
    with torch.no_grad(), context():
        assert model(ids()).last_hidden_state.isfinite().all()
    assert not compiled_calls


def test_modules_run_where_calls_are_recorded(compiled_calls):
    model = tiny()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids())
    assert counter.get_total_flops() > 0 and not compiled_calls
    handle = nn.modules.module.register_module_forward_hook(nothing)
    hidden(model)
    handle.remove()
    assert not compiled_calls


def test_modules_run_in_training_in_float64_and_on_other_backends(compiled_calls):
    for backend in ("reference", "torch"):
        with fastlm.use_backend(backend):
            hidden(tiny())
    with fastlm.use_backend(None):
        hidden(tiny().double())
    hidden(tiny(hidden_dropout_prob=0.1).train())
    assert not compiled_calls
    model = tiny()
    assert torch.equal(hidden(model.train()), hidden(model.eval()))  # without dropout they are the same
    assert len(compiled_calls) == 2


def test_dropout_after_a_compiled_call(compiled_calls):
    model = tiny(hidden_dropout_prob=0.5)
    before = hidden(model)
    assert not torch.equal(hidden(model.train()), before)
    assert torch.equal(hidden(model.eval()), before) and len(compiled_calls) == 2


@torch.no_grad()
def test_half_precision_of_one_layer_is_the_error_of_the_modules():
    model = tiny()
    layers_of(model)[0].bfloat16()
    with pytest.raises((ValueError, TypeError), match=r"weight: expected .*float32"):
        hidden(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(copied, compiled_calls):
    model = tiny()
    before = hidden(model, RIGHT)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(hidden(other, RIGHT), before) and len(compiled_calls) == 2


def test_a_dropped_model_is_freed():
    model = tiny()
    hidden(model)
    weight = weakref.ref(layers_of(model)[0].output.dense.weight)
    del model
    gc.collect()
    assert weight() is None


def test_embeddings_of_the_caller_are_not_overwritten(compiled_calls):
    model, given = tiny(), torch.randn(1, 5, 48)
    before = given.clone()
    with torch.no_grad():
        model(inputs_embeds=given)
    assert torch.equal(given, before) and len(compiled_calls) == 1


@pytest.mark.parametrize("size, expected", [(0, "tensor with storage"), (4096, "storage of at least")])
def test_freed_and_shrunk_weights_are_the_error_of_the_modules(size, expected):
    model = tiny()
    hidden(model)
    layers_of(model)[1].output.dense.weight.untyped_storage().resize_(size)
    with pytest.raises(ValueError, match=f"w2: expected a {expected}"):
        hidden(model)


# Layers and models that compute something else than their classes.


def assert_runs_by_modules(model, compiled_calls, unchanged):
    """In the first call after the change and in the next."""
    compiled_calls.clear()
    for _ in range(2):
        found = hidden(model, RIGHT)
        assert not compiled_calls
        assert torch.equal(found, by_modules(model, RIGHT)) and not torch.equal(found, unchanged)


class Doubled(nn.Module):
    """A layer with the attributes of the one in it."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *arguments):
        x, residual = self.inner(*arguments)
        return 2 * x, residual


class Alone(nn.Module):
    def forward(self, x, *_):
        return 2 * x, None


class OwnLayer(EncoderLayer):
    def attend(self, *arguments):
        return 2 * super().attend(*arguments)


def as_subclass(layer):
    layer.__class__ = OwnLayer
    return layer


LAYERS = {
    "wrapped": Doubled,
    "another module": lambda layer: Alone(),
    "nn.Sequential": lambda layer: nn.Sequential(Alone(), FirstOf(), Alone()),
    "subclass": as_subclass,
}


class FirstOf(nn.Module):
    def forward(self, pair):
        return pair[0]


class Layered(nn.ModuleList):
    def __iter__(self):
        return iter([self[0], self[0], self[1]])


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_other_classes_run_by_modules(name, compiled_calls):
    model, unchanged = tiny(), hidden(tiny(), RIGHT)
    hidden(model, RIGHT)
    if name == "nn.Sequential":
        model.run_layer = lambda layer, x, *rest: layer(x) if isinstance(layer, nn.Sequential) else layer(x, *rest)
    layers_of(model)[1] = LAYERS[name](layers_of(model)[1])
    assert_runs_by_modules(model, compiled_calls, unchanged)


def test_a_list_with_an_order_of_its_own_runs_by_modules(compiled_calls):
    model, unchanged = tiny(), hidden(tiny(), RIGHT)
    hidden(model, RIGHT)
    layers_of(model).__class__ = Layered
    assert_runs_by_modules(model, compiled_calls, unchanged)


def test_a_missing_layer_is_the_error_of_the_modules():
    model = tiny()
    hidden(model)
    del layers_of(model)[2]
    with pytest.raises(ValueError, match="longer than"):
        hidden(model)


@pytest.mark.parametrize("name", ["attend", "feed_forward"])
@pytest.mark.parametrize("of_class", [False, True], ids=["of a layer", "of the class"])
@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after a call"])
def test_replaced_methods_of_layers_are_called(name, of_class, used, compiled_calls, monkeypatch):
    model, unchanged = tiny(), hidden(tiny(), RIGHT)
    layer, own = layers_of(model)[1], getattr(EncoderLayer, name)
    if used:
        hidden(model, RIGHT)
    if of_class:
        monkeypatch.setattr(EncoderLayer, name, lambda self, *arguments: 2 * own(self, *arguments))
    else:
        setattr(layer, name, lambda *arguments: 2 * own(layer, *arguments))
    assert_runs_by_modules(model, compiled_calls, unchanged)


@pytest.mark.parametrize("of_class", [False, True], ids=["of a model", "of the class"])
def test_a_replaced_run_layer_is_called(of_class, compiled_calls, monkeypatch):
    model, unchanged, own = tiny(), hidden(tiny(), RIGHT), EncoderModel.run_layer
    hidden(model, RIGHT)

    def run_layer(self, layer, x, *arguments):
        return own(self, layer, 2 * x, *arguments)

    if of_class:
        monkeypatch.setattr(EncoderModel, "run_layer", run_layer)
    else:
        model.__class__ = type("Own", (type(model),), {"run_layer": run_layer})
    assert_runs_by_modules(model, compiled_calls, unchanged)


@pytest.mark.parametrize("kind", [nn.Module, nn.Linear, EncoderLayer])
@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after a call"])
def test_a_replaced_call_of_a_class_is_called(kind, used, compiled_calls, monkeypatch):
    model, own, called = tiny(), nn.Module.__call__, []
    if used:
        hidden(model)
        compiled_calls.clear()

    def call(self, *arguments, **options):
        called.append(self)
        return own(self, *arguments, **options)

    monkeypatch.setattr(kind, "__call__", call)
    hidden(model)
    assert not compiled_calls and any(isinstance(each, kind) and each in layers_of(model).modules() for each in called)


# What forward() reads, changed without a change of a module.


def prune_heads(model):
    attention = layers_of(model)[1].attention
    projections = attention.self.query, attention.self.key, attention.self.value
    width = layers_of(model)[1].head_dim
    for projection in projections:
        projection.weight.data, projection.bias.data = projection.weight[:-width].data, projection.bias[:-width].data
    attention.output.dense.weight.data = attention.output.dense.weight[:, :-width].data.clone()


def widen_mlp(model):
    torch.manual_seed(4)
    layer = layers_of(model)[1]
    layer.intermediate.dense.weight.data, layer.intermediate.dense.bias.data = torch.randn(400, 48), torch.randn(400)
    layer.output.dense.weight.data = torch.randn(48, 400)


def stride_weight(model):
    weight = layers_of(model)[1].intermediate.dense.weight
    weight.data = (2 * weight.data).repeat_interleave(2, 1).repeat_interleave(2, 0)[::2, ::2]


def stride_norm(model):
    weight = layers_of(model)[1].output.LayerNorm.weight
    weight.data = (2 * weight.data).repeat_interleave(2)[::2]


def halve_heads(model):
    """Twice as many heads, though num_heads is as before."""
    layers_of(model)[1].head_dim //= 2


@torch.no_grad()
@pytest.mark.parametrize("change", [prune_heads, widen_mlp, stride_weight, stride_norm, halve_heads])
@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after a call"])
def test_what_forward_reads_is_what_is_computed(change, used):
    model, unchanged = tiny(), hidden(tiny(), RIGHT)
    if used:
        hidden(model, RIGHT)
    change(model)
    for _ in range(2):
        found = hidden(model, RIGHT)
        assert torch.equal(found, by_modules(model, RIGHT)) and not torch.equal(found, unchanged)


def test_errors_of_attributes_are_those_of_the_modules():
    for name, value in (("activation", "other"), ("scale", "1"), ("head_dim", 7)):
        model = tiny()
        hidden(model)
        setattr(layers_of(model)[1], name, value)
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            hidden(model)
        with pytest.raises(type(caught.value)) as expected:
            by_modules(model)
        assert str(caught.value) == str(expected.value)


def test_an_input_with_the_negative_bit_is_named():
    with torch.no_grad(), pytest.raises(ValueError, match="x: expected a tensor without the negative bit"):
        tiny().run_layers(torch.randn(1, 5, 48)._neg_view(), {}, None, None)


def test_a_change_while_layers_are_described_is_not_missed(monkeypatch):
    model, unchanged, own = tiny(), hidden(tiny(), RIGHT), EncoderLayer.describe

    def describe(self):
        found = own(self)
        if self is layers_of(model)[2] and self.scale < 1:
            layers_of(model)[0].scale = 2.0  # as another thread may do
        return found

    assert layers_of(model)[0].scale < 1
    with monkeypatch.context() as patched:
        patched.setattr(EncoderLayer, "describe", describe)
        hidden(model, RIGHT)
    found = hidden(model, RIGHT)
    assert torch.equal(found, by_modules(model, RIGHT)) and not torch.equal(found, unchanged)


def test_a_refused_layer_is_remembered(monkeypatch, compiled_calls):
    model, asked, own = tiny(), [], encode_layers.must_be_called
    monkeypatch.setattr(
        encode_layers, "must_be_called", lambda *arguments: (asked.append(arguments), own(*arguments))[1]
    )
    hook = layers_of(model)[1].register_forward_hook(nothing)
    for _ in range(3):
        hidden(model)
    assert len(asked) == 2 and not compiled_calls
    hook.remove()
    hidden(model)
    assert len(compiled_calls) == 1
