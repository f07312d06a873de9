"""Accelerated encoders whose layers run in one compiled call: the bits of layers that run one by one, which do where
something needs them.
"""

import copy
import functools
import gc
import importlib.util
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import BaseModelOutput

import fastlm
from fastlm.backends import isa
from fastlm.integrations import encoders
from fastlm.integrations.packing import packed_output
from fastlm.models import encode_layers
from tests.integrations.support import BERT, SETTINGS, V5, accelerated_copy, ids, padded, tiny
from tests.support import recorded_calls

pytestmark = pytest.mark.skipif(not isa.kernels, reason=f"not compiled: {isa.missing}")

COMPILED = ["Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert"]
BY_LAYERS = [family for family in ("MPNet", "ModernBert", "Gte", "NomicBert", "EuroBert") if family in SETTINGS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def compiled_calls(monkeypatch):
    """The calls of the layers' compiled function."""
    return recorded_calls(monkeypatch, encode_layers, "encode")


@pytest.fixture(autouse=True)
def on_cpu_kernels():
    """On every CPU, whatever its table selects."""
    with fastlm.use_backend("cpu"):
        yield


def new_pair(family="Bert", dtype=torch.float32, head="Model", **changes):
    """(accelerated, as it comes)."""
    reference = tiny(family, head, **changes).to(dtype)
    return accelerated_copy(reference), reference


def layers_of(model):
    base = model.base_model
    return (base.encoder if hasattr(base, "encoder") else base.transformer).layer


@torch.no_grad()
def call(model, x, mask=None, **arguments):
    return model(x, attention_mask=mask, **arguments)


@pytest.fixture
def by_layers(monkeypatch):
    """Calls whose layers run one by one."""

    def run(*arguments, **options):
        with monkeypatch.context() as patched:
            patched.setattr(encoders.EncoderPatch, "run_compiled", lambda self, arguments: None)
            return call(*arguments, **options)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", COMPILED)
def test_bits_of_the_layers(family, dtype, compiled_calls, by_layers):
    (model, reference), (x, mask) = new_pair(family, dtype), padded(17, 5, 1)
    threads = torch.get_num_threads()
    try:
        for number_of_threads, given in ((1, None), (2, mask), (1, torch.ones_like(mask))):
            torch.set_num_threads(number_of_threads)
            compiled_calls.clear()
            found = call(model, x, given)
            assert len(compiled_calls) == 1
            expected = by_layers(model, x, given)
            assert len(compiled_calls) == 1
            assert type(found) is type(expected) and found.keys() == expected.keys()
            for a, b in zip(found.to_tuple(), expected.to_tuple(), strict=True):
                assert torch.equal(a, b)
            if dtype == torch.float32:
                where = slice(None) if given is None else given.bool()
                torch.testing.assert_close(found[0][where], call(reference, x, given)[0][where], **CLOSE)
    finally:
        torch.set_num_threads(threads)


def test_one_query(compiled_calls, by_layers):
    (model, reference), x = new_pair(), ids(1, 7)
    for mask in (None, torch.ones_like(x)):
        assert torch.equal(call(model, x, mask)[0], by_layers(model, x, mask)[0])
    torch.testing.assert_close(call(model, x)[0], call(reference, x)[0], **CLOSE)
    assert len(compiled_calls) == 3


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"])
def test_heads(family, head, compiled_calls):
    (model, reference), (x, mask) = new_pair(family, head=head), padded(17, 5, 1)
    for given, arguments in ((mask, {}), (None, {}), (mask, {"return_dict": False}), (None, {"return_dict": False})):
        compiled_calls.clear()
        found, expected = (call(each, x, given, **arguments)[0] for each in (model, reference))
        where = mask.bool() if given is not None and found.shape[:2] == mask.shape else slice(None)
        torch.testing.assert_close(found[where], expected[where], **CLOSE)
        assert len(compiled_calls) == 1


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_activations(activation, compiled_calls, by_layers):
    (model, reference), (x, mask) = new_pair(hidden_act=activation), padded(17, 5)
    found = call(model, x, mask)[0]
    assert torch.equal(found, by_layers(model, x, mask)[0])
    torch.testing.assert_close(found[mask.bool()], call(reference, x, mask)[0][mask.bool()], **CLOSE)
    assert len(compiled_calls) == 1


def test_packed_output(compiled_calls):
    (model, _), (x, mask) = new_pair(), padded(17, 5, 1)
    expected = call(model, x, mask)[0][mask.bool()]
    with packed_output() as taken:
        rows = call(model, x, mask)[0]
    assert torch.equal(rows, expected[None]) and taken[0].cu_seqlens.tolist() == [0, 17, 22, 23]
    with packed_output() as taken:
        assert call(model, x)[0].shape == (3, 17, 36)
    assert not taken and len(compiled_calls) == 3


@pytest.mark.parametrize("family", BY_LAYERS)
def test_other_families_run_by_layers(family, compiled_calls):
    model, (x, mask) = accelerated_copy(tiny(family)), padded(17, 5, 1)
    call(model, x), call(model, x, mask)
    assert not compiled_calls


def test_padding_at_the_beginning_runs_by_layers(compiled_calls):
    (model, reference), (x, mask) = new_pair(), padded(17, 5, 1)
    mask = mask.flip(1)
    found, expected = (call(each, x, mask)[0][mask.bool()] for each in (model, reference))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not compiled_calls


def test_masks_of_every_query_run_by_layers(compiled_calls):
    (model, reference), x = new_pair(), ids(2, 9)
    mask = torch.ones(9, 9).tril()[None, None].expand(2, 1, 9, 9)
    mask = mask.bool() if V5 else mask[:, 0]
    found, expected = (call(each, x, mask)[0] for each in (model, reference))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not compiled_calls


# What asks for modules, before and after a compiled call.


def nothing(*_):
    pass


def hook(name, register="register_forward_hook"):
    return lambda model: getattr(layers_of(model)[1].get_submodule(name), register)(nothing)


def replace_forward(model):
    norm = layers_of(model)[1].output.LayerNorm
    own = norm.forward
    norm.forward = lambda x: 2 * own(x)


def change_class(model):
    norm = layers_of(model)[1].output.LayerNorm

    class Doubled(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    norm.__class__ = Doubled


def parametrize(model):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layers_of(model)[1].output.dense, "weight", Twice())


def other_activation(model):
    layers_of(model)[1].intermediate.intermediate_act_fn = nn.ReLU()


def adapter(model):
    import peft

    config = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


MODULES = {
    "hook of a layer": hook(""),
    "pre-hook of a layer": hook("", "register_forward_pre_hook"),
    "hook of attention": hook("attention"),
    "hook of a projection": hook("attention.self.query"),
    "pre-hook of a projection": hook("output.dense", "register_forward_pre_hook"),
    "hook of a norm": hook("output.LayerNorm"),
    "hook of dropout": hook("output.dropout"),
    "hook of an activation": hook("intermediate.intermediate_act_fn"),
    "forward": replace_forward,
    "class": change_class,
    "parametrization": parametrize,
    "activation": other_activation,
    "adapter": adapter,
}


@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after a call"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_that_must_be_called(name, used, compiled_calls):
    if name == "adapter" and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    (model, reference), (x, mask) = new_pair(), padded(17, 5, 1)
    if used:
        call(model, x, mask)
        compiled_calls.clear()
    for each in (model, reference):
        torch.manual_seed(3)
        MODULES[name](each)
    for given in (mask, None):
        found, expected = (call(each, x, given)[0][mask.bool()] for each in (model, reference))
        torch.testing.assert_close(found, expected, **CLOSE)
    assert not compiled_calls


def test_a_removed_hook(compiled_calls):
    (model, _), x = new_pair(), ids(2, 9)
    handle = layers_of(model)[1].output.register_forward_hook(nothing)
    expected = call(model, x)[0]
    assert not compiled_calls
    handle.remove()
    torch.testing.assert_close(call(model, x)[0], expected, **CLOSE)
    assert len(compiled_calls) == 1


def replace_weight(model):
    projection = layers_of(model)[1].output.dense
    projection.weight = nn.Parameter(2 * projection.weight)


def change_data(model):
    projection = layers_of(model)[1].attention.self.query
    projection.weight.data = 2 * projection.weight.data


def change_in_place(model):
    layers_of(model)[1].attention.self.value.weight.mul_(2)


def replace_layer(model):
    layers_of(model)[1] = copy.deepcopy(layers_of(model)[0])


def set_epsilon(model):
    for norm in (layers_of(model)[1].output.LayerNorm, layers_of(model)[1].attention.output.LayerNorm):
        norm.eps = 0.5


def remove_layer(model):
    del layers_of(model)[1]


FOLLOWED = (replace_weight, change_data, change_in_place, replace_layer, set_epsilon, remove_layer)


@torch.no_grad()
@pytest.mark.parametrize("change", FOLLOWED)
def test_compiled_calls_follow_changes(change, compiled_calls, by_layers):
    (model, reference), (x, mask) = new_pair(), padded(17, 5, 1)
    before = call(model, x, mask)[0]
    change(model), change(reference)
    found = call(model, x, mask)[0]
    assert len(compiled_calls) == 2
    assert torch.equal(found, by_layers(model, x, mask)[0]) and not torch.equal(found, before)
    torch.testing.assert_close(found[mask.bool()], call(reference, x, mask)[0][mask.bool()], **CLOSE)


def assert_runs_by_layers(compute, compiled_calls):
    """compute(model, inputs) of an accelerated model that has made a compiled call, and of the model as it comes."""
    (model, reference), x = new_pair(), ids(2, 9)
    call(model, x)
    compiled_calls.clear()
    found, expected = compute(model, x), compute(reference, x)
    assert not compiled_calls
    return found, expected


def test_outputs_of_layers(compiled_calls):
    def outputs(model, x):
        model.set_attn_implementation("eager")
        states = call(model, x, output_hidden_states=True).hidden_states
        return *states, *call(model, x, output_attentions=True).attentions

    found, expected = assert_runs_by_layers(outputs, compiled_calls)
    assert len(found) == len(expected) == 3 + 2
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after a call"])
def test_after_outputs_of_layers(used, compiled_calls, by_layers):
    """What captures them stays on the modules."""
    (model, _), x = new_pair(), ids(2, 9)
    expected = by_layers(model, x)[0]
    if used:
        call(model, x)
    call(model, x, output_hidden_states=True)
    compiled_calls.clear()
    assert torch.equal(call(model, x)[0], expected) and len(compiled_calls) == 1
    layers_of(model)[1].register_forward_hook(lambda module, inputs, output: None)
    call(model, x)
    assert len(compiled_calls) == 1
    assert len(call(model, x, output_hidden_states=True).hidden_states) == 3


def test_gradients(compiled_calls):
    def gradient(model, x):
        model(x)[0].square().sum().backward()
        return layers_of(model)[0].output.dense.weight.grad

    torch.testing.assert_close(*assert_runs_by_layers(gradient, compiled_calls), rtol=1e-3, atol=1e-4)


def test_autocast(compiled_calls):
    def computed(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(model, x)[0]

    torch.testing.assert_close(*assert_runs_by_layers(computed, compiled_calls), rtol=0.1, atol=0.1)


def test_global_hooks(compiled_calls):
    def seen_modules(model, x):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        call(model, x)
        handle.remove()
        return seen

    found, expected = assert_runs_by_layers(seen_modules, compiled_calls)
    assert found == expected


def test_tracing_and_transforms(compiled_calls):
    def traced(model, x):
        model.config.return_dict = False
        with torch.no_grad():
            return torch.jit.trace(model, (x,), check_trace=False)(x + 1)[0]

    def mapped(model, x):
        embeddings = torch.randn(3, 2, 9, 36, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return torch.func.vmap(lambda given: model.encoder(given)[0])(embeddings)

    for compute in (traced, mapped):
        torch.testing.assert_close(*assert_runs_by_layers(compute, compiled_calls), **CLOSE)


def test_fake_tensors_and_recorded_calls(compiled_calls):
    (model, _), x = new_pair(), ids(2, 9)
    call(model, x)
    compiled_calls.clear()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() > 0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert model.encoder(mode.from_tensor(torch.randn(2, 9, 36)))[0].shape == (2, 9, 36)
    assert not compiled_calls


@pytest.mark.slow
def test_compile(compiled_calls):
    def computed(model, x):
        return call(torch.compile(model, backend="aot_eager", fullgraph=True), x)[0]

    torch.testing.assert_close(*assert_runs_by_layers(computed, compiled_calls), **CLOSE)


def test_dropout_in_training(compiled_calls):
    model, x = accelerated_copy(tiny("Bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)), ids(2, 9)
    before = call(model, x)[0]
    model.train()
    assert not torch.equal(call(model, x)[0], call(model, x)[0])
    assert torch.equal(call(model.eval(), x)[0], before) and len(compiled_calls) == 2
    model.base_model.embeddings.train()  # no layer drops anything
    call(model, x)
    assert len(compiled_calls) == 3
    for layer in layers_of(model):
        layer.output.dropout.train()
    call(model, x)
    assert len(compiled_calls) == 3


def test_training_without_dropout(compiled_calls):
    (model, _), x = new_pair(), ids(2, 9)
    assert torch.equal(call(model.train(), x)[0], call(model.eval(), x)[0]) and len(compiled_calls) == 2


def test_decoders_and_other_arguments(compiled_calls):
    (decoder, _), (model, reference), x = new_pair(is_decoder=True), new_pair(), ids(2, 9)
    call(decoder, x)
    positions = torch.arange(9).flip(0)[None]
    found, expected = (call(each, x, position_ids=positions)[0] for each in (model, reference))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert len(compiled_calls) == 1
    with torch.no_grad():  # an argument that layers may read
        encoder, states = model.encoder, torch.randn(2, 9, 36)
        encoder(states, encoder_hidden_states=torch.randn(2, 4, 36)) if not V5 else encoder(states, is_causal=True)
    assert len(compiled_calls) == 1


@pytest.mark.parametrize("excluded", ["attention", "layernorm", "mlp", "unpad"])
def test_layers_that_are_not_replaced_whole(excluded, compiled_calls):
    reference, x = tiny("Bert"), ids(2, 9)
    model = accelerated_copy(reference, **{excluded: False})
    torch.testing.assert_close(call(model, x)[0], call(reference, x)[0], **CLOSE)
    assert not compiled_calls


def test_other_backends_and_dtypes(compiled_calls):
    (model, _), x = new_pair(), ids(2, 9)
    call(model, x)
    compiled_calls.clear()
    for backend in ("torch", "reference"):
        with fastlm.use_backend(backend):
            call(model, x)
    with fastlm.use_backend(None):
        call(model.double(), x)
    assert not compiled_calls


def early_exit(self, hidden_states, *arguments, **options):
    x = self.layer[0](hidden_states)
    return BaseModelOutput(last_hidden_state=2 * (x[0] if isinstance(x, tuple) else x))


@torch.no_grad()
@pytest.mark.parametrize("how", ["forward", "wrapped forward", "class"])
@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_a_replaced_forward_of_the_encoder_is_called(how, family, compiled_calls, monkeypatch):
    (model, reference), x = new_pair(family), torch.randn(2, 9, 36)
    models = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), reference]
    encoders = [each.encoder if hasattr(each, "encoder") else each.transformer for each in models]
    encoders[0](x)
    assert len(compiled_calls) == 1
    kind = type(encoders[0])
    if how == "class":
        for each in encoders:
            each.__class__ = type("Changed", (kind,), {"forward": early_exit})
    else:
        wrap = functools.wraps(kind.forward) if how == "wrapped forward" else lambda function: function
        monkeypatch.setattr(kind, "forward", wrap(lambda *arguments, **options: early_exit(*arguments, **options)))
    for each in encoders[:-1]:
        torch.testing.assert_close(each(x)[0], encoders[-1](x)[0], **CLOSE)
    assert len(compiled_calls) == 1


@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after a call"])
@pytest.mark.parametrize("of_layers", [False, True], ids=["of all modules", "of layers"])
def test_a_replaced_call_of_a_class_is_called(of_layers, used, compiled_calls, monkeypatch):
    (model, _), x, called = new_pair(), ids(2, 9), []
    if used:
        call(model, x)
        compiled_calls.clear()
    kind = type(layers_of(model)[0]) if of_layers else nn.Module
    own = kind.__call__

    def counted(self, *arguments, **options):
        called.append(self)
        return own(self, *arguments, **options)

    monkeypatch.setattr(kind, "__call__", counted)
    call(model, x)
    assert not compiled_calls and called


def prune_heads(model):
    attention = layers_of(model)[1].attention
    for projection in (attention.self.query, attention.self.key, attention.self.value):
        projection.weight.data, projection.bias.data = projection.weight[::2].clone(), projection.bias[::2].clone()
    attention.output.dense.weight.data = attention.output.dense.weight[:, ::2].clone()


def widen_mlp(model):
    torch.manual_seed(4)
    layer, width = layers_of(model)[1], layers_of(model)[1].output.LayerNorm.weight.shape[0]
    layer.intermediate.dense.weight.data, layer.intermediate.dense.bias.data = torch.randn(400, width), torch.randn(400)
    layer.output.dense.weight.data = torch.randn(width, 400) / 20


def stride_weight(model):
    weight = layers_of(model)[1].intermediate.dense.weight
    weight.data = (2 * weight.data).repeat_interleave(2, 1).repeat_interleave(2, 0)[::2, ::2]


@torch.no_grad()
@pytest.mark.parametrize("change", [prune_heads, widen_mlp, stride_weight])
def test_data_of_another_shape_or_layout(change, by_layers):
    (model, _), x = new_pair(), ids(2, 9)
    unchanged = call(model, x)[0]
    change(model)
    for _ in range(2):
        found = call(model, x)[0]
        assert torch.equal(found, by_layers(model, x)[0]) and not torch.equal(found, unchanged)


@torch.no_grad()
def test_mixed_dtypes_are_the_error_of_the_layers(by_layers):
    (model, _), x = new_pair(), ids(2, 9)
    call(model, x)
    layers_of(model)[1].output.dense.bfloat16()
    with pytest.raises((ValueError, TypeError)) as expected:
        by_layers(model, x)
    with pytest.raises((ValueError, TypeError)) as caught:
        call(model, x)
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("size, expected", [(0, "tensor with storage"), (1024, "storage of at least")])
def test_freed_and_shrunk_weights_are_an_error(size, expected):
    (model, _), x = new_pair(), ids(2, 9)
    call(model, x)
    layers_of(model)[1].intermediate.dense.weight.untyped_storage().resize_(size)
    with pytest.raises(ValueError, match=f"w1: expected a {expected}"):
        call(model, x)


# The life of a model.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(copied, compiled_calls):
    (model, _), (x, mask) = new_pair(), padded(17, 5, 1)
    before = call(model, x, mask)[0]
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(call(other, x, mask)[0], before) and len(compiled_calls) == 2
    call(fastlm.restore(other), x, mask)
    assert len(compiled_calls) == 2


def test_restored_and_accelerated_again(compiled_calls):
    (model, reference), (x, mask) = new_pair(), padded(17, 5, 1)
    found = call(model, x, mask)[0]
    assert torch.equal(call(fastlm.restore(model), x, mask)[0], call(reference, x, mask)[0])
    assert torch.equal(call(fastlm.accelerate(model), x, mask)[0], found)
    assert len(compiled_calls) == 2


def test_a_dropped_model_is_freed():
    (model, _), x = new_pair(), ids(2, 9)
    call(model, x)
    weight = weakref.ref(layers_of(model)[0].output.dense.weight)
    del model
    gc.collect()
    assert weight() is None


def test_layers_are_described_once(monkeypatch):
    (model, _), described, own = new_pair(), [], encode_layers.Description.describe_layer

    def spy(self, layer):
        described.append(layer)
        return own(self, layer)

    monkeypatch.setattr(encode_layers.Description, "describe_layer", spy)
    for _ in range(3):
        call(model, ids(2, 9))
    assert described == [*layers_of(model)] and len(described) == BERT["num_hidden_layers"]
