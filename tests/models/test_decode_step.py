"""Decode steps whose layers run in one compiled call: the bits of the modules, which run where something needs them."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import fastlm
from fastlm.backends import isa
from fastlm.models import decode_step
from fastlm.models.cache import KVCache
from fastlm.models.decoder import DecoderMLP
from tests.models.hugging_face import DECODERS, ours_like, tiny_decoder, tiny_gpt2
from tests.models.test_decoder import VARIANTS
from tests.support import recorded_calls, shrunk

pytestmark = pytest.mark.skipif(not isa.kernels, reason=f"not compiled: {isa.missing}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PROMPT, STEPS = 4, 14  # beyond twice a window of 5, where its keys are moved
MODELS = {
    **{family: lambda family=family: tiny_decoder(family) for family in DECODERS},
    **{name: lambda case=case: tiny_decoder(case[0], **case[1]) for name, case in VARIANTS.items()},
    "gpt2": tiny_gpt2,
    "gpt2, scores scaled by layer": lambda: tiny_gpt2(scale_attn_by_inverse_layer_idx=True, n_inner=40),
    "gpt2, exact GELU": lambda: tiny_gpt2(activation_function="gelu"),
}


def tiny(name="llama", dtype=torch.float32):
    torch.manual_seed(0)
    return ours_like(MODELS[name]()).to(dtype)


def layers_of(model):
    return model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h


@pytest.fixture
def compiled_calls(monkeypatch):
    """The calls of the layers' compiled function."""
    return recorded_calls(monkeypatch, decode_step, "decode")


@pytest.fixture(autouse=True)
def on_cpu_kernels():
    """On every CPU, whatever its table selects."""
    with fastlm.use_backend("cpu"):
        yield


def left_padding(batch):
    mask = torch.ones(batch, PROMPT + STEPS, dtype=torch.bool)
    for row in range(1, batch):
        mask[row, :row] = False
    return mask


@torch.no_grad()
def logits_of(model, batch=1, mask=None, before_step=lambda step, cache: None, steps=STEPS):
    """Of the prompt, then of each step."""
    ids = torch.randint(0, 131, (batch, PROMPT + steps), generator=torch.Generator().manual_seed(1))
    cache, results = model.new_cache(PROMPT + steps), []
    for step in range(steps + 1):
        before_step(step, cache)
        new = slice(cache.length, PROMPT + step)
        part = None if mask is None else mask[:, : new.stop]
        results.append(model(ids[:, new], cache, part).logits)
    return results


def nothing(*_):
    pass


def by_modules(model, *arguments, **options):
    """The same, computed by the modules: one of them has a hook."""
    hook = layers_of(model)[-1].register_forward_hook(nothing)
    try:
        return logits_of(model, *arguments, **options)
    finally:
        hook.remove()


def assert_equal(results, expected):
    assert all(map(torch.equal, results, expected))


CASES = [(name, dtype) for name in MODELS for dtype in (DTYPES if name in (*DECODERS, "gpt2") else DTYPES[:1])]


@pytest.mark.parametrize("name, dtype", CASES, ids=str)
def test_steps_give_the_bits_of_the_modules(name, dtype, compiled_calls):
    model = tiny(name, dtype)
    threads = torch.get_num_threads()
    try:
        for batch, mask, number_of_threads in ((1, None, 1), (3, None, 2), (3, left_padding(3), 1)):
            torch.set_num_threads(number_of_threads)
            compiled_calls.clear()
            results = logits_of(model, batch, mask)
            assert len(compiled_calls) == STEPS
            compiled_calls.clear()
            assert_equal(results, by_modules(model, batch, mask))
            assert not compiled_calls
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_larger_layers(dtype):
    """Products that are divided into parts, and several blocks of k."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4}
    model = ours_like(tiny_decoder("llama", **sizes)).to(dtype)
    assert_equal(logits_of(model, 2, steps=3), by_modules(model, 2, steps=3))


def test_norms_in_float32_under_16_bits():
    model = tiny(dtype=torch.bfloat16)
    for layer in layers_of(model):
        layer.input_layernorm.float()
    assert_equal(logits_of(model), by_modules(model))


@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_generate_runs_steps(name, compiled_calls):
    model, ids = tiny(name), torch.randint(0, 131, (2, PROMPT))
    tokens = model.generate(ids, max_new_tokens=20)
    assert len(compiled_calls) == 19
    layers_of(model)[0].register_forward_pre_hook(nothing)
    assert torch.equal(model.generate(ids, max_new_tokens=20), tokens)
    assert len(compiled_calls) == 19


# What a user may do to a model; the modules run then, or the compiled calls follow.


def replace_weight(model):
    projection = layers_of(model)[1].mlp.down_proj
    projection.weight = nn.Parameter(projection.weight * 2)


def change_data(model):
    projection = layers_of(model)[1].self_attn.q_proj
    projection.weight.data = projection.weight.data * 2


def change_in_place(model):
    layers_of(model)[1].self_attn.k_proj.weight.mul_(2)


def replace_module(model):
    torch.manual_seed(2)
    mlp = layers_of(model)[0].mlp
    mlp.gate_proj = nn.Linear(48, 80)


def replace_layer(model):
    layers = layers_of(model)
    layers[2] = copy.deepcopy(layers[1])


def replace_forward(model):
    norm = layers_of(model)[1].post_attention_layernorm
    own = norm.forward
    norm.forward = lambda x, residual=None: tuple(2 * y for y in own(x, residual))


def add_hook(model):
    attention = layers_of(model)[1].self_attn
    attention.register_forward_hook(lambda module, inputs, output: output * 2)


def add_pre_hook(model):
    attention = layers_of(model)[1].self_attn
    attention.o_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def set_attribute(model):
    layers_of(model)[1].self_attn.scale *= 2


def set_epsilon(model):
    layers_of(model)[1].input_layernorm.eps = 0.5


def add_bias(model):
    layers_of(model)[0].mlp.down_proj.bias = nn.Parameter(torch.ones(48))


def parametrize(model):
    projection = layers_of(model)[1].self_attn.v_proj
    nn.utils.parametrize.register_parametrization(projection, "weight", nn.Identity())


class TwiceAsLarge(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 2 * self.module(x)


def wrap(model):
    """As adapters are put into a model."""
    layers_of(model)[1].self_attn.q_proj = TwiceAsLarge(layers_of(model)[1].self_attn.q_proj)


CHANGES = (
    replace_weight,
    change_data,
    change_in_place,
    replace_module,
    replace_layer,
    replace_forward,
    add_hook,
    add_pre_hook,
    set_attribute,
    set_epsilon,
    add_bias,
    parametrize,
    wrap,
)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", [0, 3], ids=["before", "between steps"])
def test_a_changed_model_is_not_computed_as_it_was(change, when):
    changed, expected = tiny(), tiny()
    unchanged = logits_of(changed, steps=6)
    results = logits_of(changed, before_step=lambda step, _: change(changed) if step == when else None, steps=6)
    assert_equal(
        results, by_modules(expected, before_step=lambda step, _: change(expected) if step == when else None, steps=6)
    )
    assert change is parametrize or not torch.equal(results[-1], unchanged[-1])


@pytest.mark.parametrize("when", [0, 3], ids=["before", "between steps"])
def test_a_replaced_forward_of_a_class_is_called(when, monkeypatch):
    own = DecoderMLP.forward

    def change(step, _):
        if step == when:
            monkeypatch.setattr(DecoderMLP, "forward", lambda self, x: 2 * own(self, x))

    unchanged = logits_of(tiny(), steps=6)
    results = logits_of(tiny(), before_step=change, steps=6)
    monkeypatch.setattr(DecoderMLP, "forward", own)
    assert_equal(results, by_modules(tiny(), before_step=change, steps=6))
    assert not torch.equal(results[-1], unchanged[-1])


@pytest.mark.parametrize("context", [torch.enable_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_modules_run_under_gradients_and_autocast(context, compiled_calls):
    model = tiny().requires_grad_(False)
    with torch.no_grad():
        cache = model.new_cache(9)
        model(torch.zeros(1, 4, dtype=torch.long), cache)
        with context():
            cache = copy.deepcopy(cache)
            assert model(torch.zeros(1, 1, dtype=torch.long), cache).logits.isfinite().all()
    assert not compiled_calls


def test_modules_run_in_training_in_float64_and_on_other_backends(compiled_calls):
    with fastlm.use_backend("reference"):
        logits_of(tiny(), steps=2)
    with fastlm.use_backend(None):
        logits_of(tiny().double(), steps=2)
    logits_of(tiny().train(), steps=2)
    assert not compiled_calls


def test_modules_run_where_the_table_selects_another_backend(compiled_calls, monkeypatch):
    from fastlm.backends import selection, table
    from fastlm.backends.rule import Rule

    def rules(device):
        return (Rule("rotary", "float32", {"heads": (4, 4)}, "reference"),)

    monkeypatch.setattr(table, "without_small_calls", rules)
    selection.forget()
    with fastlm.use_backend(None):
        logits_of(tiny(), steps=2)
        assert not compiled_calls
        logits_of(tiny(dtype=torch.bfloat16), steps=2)
    selection.forget()


def test_several_tokens_run_by_modules(compiled_calls):
    model = tiny()
    with torch.no_grad():
        cache = model.new_cache(9)
        for tokens in (1, 4, 2):  # the first is the whole prompt
            model(torch.zeros(1, tokens, dtype=torch.long), cache)
    assert not compiled_calls


def test_a_copied_cache_goes_on_alone():
    model, ids = tiny("mistral"), torch.randint(0, 131, (1, 12))
    with torch.no_grad():
        cache, again = model.new_cache(12), model.new_cache(12)
        for cut in (slice(0, 4), slice(4, 5), slice(5, 6)):
            model(ids[:, cut], cache)
        other = copy.deepcopy(cache)
        model(ids[:, :1], other)
        model(ids[:, :6], again)
        torch.testing.assert_close(model(ids[:, 6:7], cache).logits, model(ids[:, 6:7], again).logits)


def test_the_model_is_freed_with_the_cache():
    model = tiny()
    caches = []
    logits_of(model, before_step=lambda step, cache: caches.append(cache), steps=2)
    weight = weakref.ref(layers_of(model)[0].mlp.up_proj.weight)
    del model
    caches.clear()
    gc.collect()
    assert weight() is None


def test_embeddings_of_the_caller_are_not_overwritten():
    model = tiny()
    with torch.no_grad():
        cache = model.new_cache(9)
        model(torch.zeros(1, 4, dtype=torch.long), cache)
        given = torch.randn(1, 1, 48)
        before = given.clone()
        model(inputs_embeds=given, past_key_values=cache)
    assert torch.equal(given, before)


def test_a_full_cache_is_the_error_of_the_modules():
    model = tiny()
    with torch.no_grad():
        cache = KVCache(3, 5)
        model(torch.zeros(1, 4, dtype=torch.long), cache)
        model(torch.zeros(1, 1, dtype=torch.long), cache)
        with pytest.raises(ValueError, match="past_key_values: expected capacity for 6 tokens, got a cache of 5"):
            model(torch.zeros(1, 1, dtype=torch.long), cache)
        with pytest.raises(ValueError, match="past_key_values: expected a cache of 2 sequences, as the input, got 1"):
            cache = KVCache(3, 9)
            model(torch.zeros(1, 4, dtype=torch.long), cache)
            model(torch.zeros(2, 1, dtype=torch.long), cache)


@pytest.mark.parametrize("size, expected", [(0, "tensor with storage"), (4096, "storage of at least")])
def test_freed_and_shrunk_weights_are_an_error(size, expected):
    model = tiny()

    def resize(step, cache):
        if step == 2:
            layers_of(model)[1].mlp.gate_proj.weight.untyped_storage().resize_(size)

    with pytest.raises(ValueError, match=f"gate: expected a {expected}"):
        logits_of(model, before_step=resize)


# The compiled function.


def arguments(**changes):
    """Of two layers of two heads of 4 channels and width 8, in float32; the changes are those of the second layer."""
    model = ours_like(tiny_decoder("llama", hidden_size=8, intermediate_size=6, num_attention_heads=2, head_dim=4))
    layers = [layer.describe()[1] for layer in layers_of(model)[:2]]
    given = {name: torch.zeros(3, 1, 8) for name in ("x", "y", "summed")}
    given |= {"key_padding": None, "threads": 1}
    state = {name: torch.zeros(3, 2, 5, 4) for name in ("keys", "values")}
    state |= {"slot": 2, "cos": torch.zeros(1, 1, 4), "sin": torch.zeros(1, 1, 4)}
    states = [state, state | {name: value for name, value in changes.items() if name in state}]
    layers[1] = layers[1]._replace(**{name: value for name, value in changes.items() if name in layers[1]._fields})
    given["slots"] = [(each["keys"], each["values"], each["slot"]) for each in states]
    given["tables"] = [(each["cos"], each["sin"]) for each in states]
    given |= {"names": layers[0]._fields, "layers": layers}
    return given | {name: value for name, value in changes.items() if name in given}


WRONG = [
    ({"slot": 5}, "slot: expected 0 to 4, got 5"),
    ({"slot": -1}, "slot: expected 0 to 4, got -1"),
    ({"keys": torch.zeros(2, 2, 5, 4)}, "keys: expected a batch of 3 and heads that divide num_heads 2, got shape"),
    ({"keys": torch.zeros(3, 3, 5, 4)}, "keys: expected a batch of 3 and heads that divide num_heads 2, got shape"),
    ({"keys": torch.zeros(3, 2, 5, 4).bfloat16()}, "keys: expected torch.float32, got torch.bfloat16"),
    ({"keys": torch.zeros(3, 2, 5)}, "keys: expected 4 dimensions, got 3"),
    ({"values": torch.zeros(3, 2, 4, 4)}, "values: expected the shape of keys, got shape"),
    ({"values": torch.zeros(3, 2, 4, 5).mT}, "values: expected a contiguous last dimension, got shape"),
    ({"cos": torch.zeros(2, 1, 4)}, "cos: expected a contiguous table of one position for each sequence, got shape"),
    ({"sin": torch.zeros(1, 1, 2)}, "sin: expected a contiguous table of one position for each sequence, got shape"),
    ({"cos": None}, "cos: expected a contiguous table of one position for each sequence, got None"),
    ({"key_padding": torch.ones(3, 2, dtype=torch.bool)}, "key_padding: expected at least 3 keys of each sequence"),
    ({"query": torch.zeros(8, 7)}, "query: expected 8 inputs and 8 outputs, got shape"),
    ({"key": None}, "value: expected a tensor if key is one, else None, got the other"),
    ({"up": torch.zeros(6)}, "up: expected 2 dimensions, got 1"),
    ({"down": torch.zeros(8, 5)}, "down: expected 6 inputs and 8 outputs, got shape"),
    ({"mlp_norm": torch.zeros(7)}, "mlp_norm: expected a contiguous tensor of 8 elements, got shape"),
    (
        {"down": shrunk(8, 6)},
        "down: expected a storage of at least 192 bytes, for its shape and strides, got one of 16",
    ),
    ({"values": shrunk(3, 2, 5, 4)}, "values: expected a storage of at least 480 bytes, for its shape and strides"),
    ({"mlp_norm": torch.ones(8).bfloat16()}, "mlp_norm: expected torch.float32, got torch.bfloat16"),
    ({"y": torch.zeros(3, 1, 7)}, "y: expected a contiguous tensor of 24 elements, got shape"),
    ({"num_heads": 0}, "keys: expected a batch of 3 and heads that divide num_heads 0, got shape"),
    ({"tables": []}, "tables: expected 2 entries, as slots, got 0"),
    ({"layers": []}, "layers: expected 2 entries, as slots, and at least one, got 0"),
]
WRONG_TYPES = [
    ({"slots": ()}, "slots: expected a list, got tuple"),
    ({"slots": [(1, 2)], "tables": [(None, None)]}, "slots: expected tuples of 3, got (1, 2)"),
    ({"layers": [(1, 2), (1, 2)]}, "layers: expected tuples of 32, got (1, 2)"),
    ({"names": []}, "names: expected a tuple"),
    ({"slot": 1.5}, "slot: expected an integer, got float"),
    ({"gate": 1}, "gate: expected a tensor, got int"),
]


@pytest.mark.parametrize("changes, message", WRONG, ids=[message for _, message in WRONG])
def test_errors_name_the_argument(changes, message):
    given = arguments(**changes)
    keys = given["slots"][0][0].fill_(7)
    with pytest.raises(ValueError) as caught:
        isa.kernels.decoder_layers(**given)
    assert str(caught.value).startswith(message)
    assert (keys == 7).all()  # nothing has run, though the first layer is right


@pytest.mark.parametrize("changes, message", WRONG_TYPES, ids=[message for _, message in WRONG_TYPES])
def test_wrong_types(changes, message):
    with pytest.raises(TypeError) as caught:
        isa.kernels.decoder_layers(**arguments(**changes))
    assert str(caught.value).startswith(message)


def test_the_valid_call_of_these():
    given = arguments()
    given["y"].fill_(7)
    isa.kernels.decoder_layers(**given)
    assert not given["y"].any()


def test_unchanged():
    a, b, value = {"x": None}, {"y": 1}, object()
    b["z"] = value
    unchanged = isa.kernels.unchanged
    assert unchanged((a, b, b, a), ("x", "z", "w", "w"), (None, value, None, None), ({},))
    assert not unchanged((b,), ("z",), (None,), ())
    assert not unchanged((a,), ("z",), (value,), ())
    assert not unchanged((), (), (), ({}, b))
    for wrong in (((), (), ()), ((a,), (), (), ()), ([], (), (), ())):
        with pytest.raises(TypeError, match=r"unchanged\(\) takes tuples"):
            unchanged(*wrong)
    with pytest.raises(TypeError, match=r"unchanged\(\): expected a dict, got list"):
        unchanged(([],), ("z",), (value,), ())
