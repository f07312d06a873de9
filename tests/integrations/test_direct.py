"""fastlm.encode without transformers' forward around the layers: the bits of the call, which is made where it can be
observed.
"""

import copy
import functools
import gc
import importlib.util
import pickle
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from fastlm.backends import isa
from fastlm.integrations.capture import captured_outputs
from fastlm.integrations.direct import are_tables, sum_of_tables
from fastlm.integrations.encoding import forward
from tests.encoding.support import texts, tokenizer
from tests.integrations.support import V5, tiny

pytestmark = pytest.mark.skipif(not isa.kernels, reason=f"not compiled: {isa.missing}")

FAMILIES = ["Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert"]
TEXTS = texts(7, longest=9)


@pytest.fixture(autouse=True)
def on_cpu_kernels():
    """On every CPU, whatever its table selects."""
    with fastlm.use_backend("cpu"):
        yield


@pytest.fixture
def is_direct(monkeypatch):
    """For each batch, whether the model was not called."""
    found, own = [], forward.last_hidden_states

    def record(*arguments):
        rows = own(*arguments)
        found.append(rows is not None)
        return rows

    monkeypatch.setattr(forward, "last_hidden_states", record)
    return found


@pytest.fixture
def by_call(monkeypatch):
    """Embeddings by a call of the model."""

    def run(*arguments, **options):
        with monkeypatch.context() as patched:
            patched.setattr(forward, "last_hidden_states", lambda *_: None)
            return encode(*arguments, **options)

    return run


def new(family="Bert", **changes):
    return fastlm.accelerate(tiny(family, **changes))


def encode(model, found=TEXTS, budget=4096, words=None):
    return fastlm.encode(model, found, tokenizer=words or tokenizer(), max_tokens_per_batch=budget)


def with_types():
    """A tokenizer that gives types of tokens, as BERT's."""
    return tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", [tokenizer, with_types], ids=["no types", "types"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_of_the_call(family, words, dtype, is_direct, by_call):
    model, words = new(family).to(dtype), words()
    for found, budget in ((TEXTS, 4096), (TEXTS, 20), (TEXTS[:1], 4096), ([TEXTS[0]] * 3, 4096)):
        is_direct.clear()
        direct = encode(model, found, budget, words)
        assert all(is_direct) and (len(is_direct) > 1) == (budget == 20)
        assert torch.equal(direct, by_call(model, found, budget, words))


def test_electra_of_one_width_and_a_model_with_a_head(is_direct, by_call):
    for model in (new("Electra", embedding_size=36), new(head="ForSequenceClassification")):
        assert torch.equal(encode(model), by_call(model)) and is_direct == [True]
        is_direct.clear()


def test_nothing_else_is_called():
    """Of transformers, one text calls the tokenizer."""
    model, called, words = new(), set(), with_types()
    encode(model, TEXTS[:1], words=words)

    def record(frame, event, argument):
        if event == "call" and frame.f_globals.get("__name__", "").startswith("transformers."):
            called.add((frame.f_globals["__name__"], frame.f_code.co_qualname))

    sys.setprofile(record)
    try:
        fastlm.encode(model, TEXTS[:1], tokenizer=words)
    finally:
        sys.setprofile(None)
    assert called and not {each for each in called if each[0].startswith(("transformers.models.", "transformers.mask"))}
    assert not {name for _, name in called if "wrapper" in name or "ModelOutput" in name}


@pytest.mark.parametrize("family", ["Bert", "Electra", "DistilBert"])
def test_types_and_positions(family):
    embeddings = tiny(family).embeddings.eval()
    ids = torch.randint(5, (3, 7))
    given = {} if family == "DistilBert" else {"token_type_ids": torch.randint(2, (3, 7))}
    with torch.no_grad():
        embeddings._buffers["position_ids"] = embeddings.position_ids.flip(1)
        weight = embeddings.LayerNorm.weight
        del embeddings.LayerNorm.weight  # so that it comes after the bias
        embeddings.LayerNorm.weight = weight
        assert are_tables(embeddings)
        assert torch.equal(sum_of_tables(embeddings, ids, **given), embeddings(input_ids=ids, **given))


def other_norm(embeddings):
    embeddings.LayerNorm = nn.RMSNorm(embeddings.LayerNorm.normalized_shape)


def other_dropout(embeddings):
    embeddings.dropout = nn.Tanh()


def largest_norm(embeddings):
    embeddings.word_embeddings.max_norm = 0.1


def no_positions(embeddings):
    embeddings.position_embedding_type = "relative_key"


@pytest.mark.parametrize("change", [other_norm, other_dropout, largest_norm, no_positions])
def test_other_parts_of_the_embeddings_are_called(change, is_direct, by_call):
    model, words = new(), with_types()
    encode(model, words=words)
    change(model.embeddings)
    # Not with the same bits: max_norm scales the weights at every call.
    torch.testing.assert_close(encode(model, words=words), by_call(model, words=words))
    assert is_direct == [True] * 2


# What can be observed, before and after a direct call. Each changes a model and returns a list to which calls append,
# or None if nothing is called.


def hook(path, register="register_forward_hook"):
    def change(model, monkeypatch):
        called = []
        getattr(model.get_submodule(path), register)(lambda *_: called.append(path))
        return called

    return change


def full_backward_hook(model, monkeypatch):
    model.register_full_backward_hook(lambda *_: None)


def global_hook(model, monkeypatch):
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: called.append(None))
    monkeypatch.setattr(model, "removes", handle.remove, raising=False)
    return called


def counted(function, called):
    @functools.wraps(function)
    def count(*arguments, **options):
        called.append(None)
        return function(*arguments, **options)

    return count


def forward_of_an_instance(path):
    def change(model, monkeypatch):
        called, module = [], model.get_submodule(path)
        module.forward = counted(module.forward, called)
        return called

    return change


def of_a_class(find, name):
    def change(model, monkeypatch):
        called, kind = [], find(model)
        monkeypatch.setattr(kind, name, counted(getattr(kind, name), called))
        return called

    return change


def subclass(model, monkeypatch):
    called, kind = [], type(model)

    class Changed(kind):
        def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, **options):
            called.append(None)
            return super().forward(input_ids, attention_mask, token_type_ids, **options)

    model.__class__ = Changed
    return called


def other_embeddings(model, monkeypatch):
    called = []

    class Counted(nn.Embedding):
        def forward(self, ids):
            called.append(None)
            return super().forward(ids)

    own = model.embeddings.word_embeddings
    model.embeddings.word_embeddings = Counted(*own.weight.shape, _weight=own.weight.detach())
    return called


def other_pooler(model, monkeypatch):
    called = []

    class Counted(nn.Module):
        def forward(self, x):
            called.append(None)
            return x[:, 0]

    model.pooler = Counted()
    return called


def is_causal(model, monkeypatch):
    model.config.is_causal = True


def outputs(name):
    def change(model, monkeypatch):
        assert name in vars(model.config)
        vars(model.config)[name] = True

    return change


def compiled(model, monkeypatch):
    called = []
    model._compiled_call_impl = counted(model._call_impl, called)
    return called


def wrapped_by_torch(model, monkeypatch):
    """As torch.compile does it, whose first import takes seconds."""
    monkeypatch.setattr(type(model), "forward", torch.no_grad()(type(model).forward))


def adapter(model, monkeypatch):
    import peft

    config = peft.LoraConfig(target_modules=["query", "word_embeddings"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


CHANGES = {
    "hook of the model": hook(""),
    "pre-hook of the model": hook("", "register_forward_pre_hook"),
    "hook of the embeddings": hook("embeddings"),
    "hook of a table": hook("embeddings.word_embeddings"),
    "hook of the embeddings' dropout": hook("embeddings.dropout"),
    "hook of the encoder": hook("encoder"),
    "pre-hook of the encoder": hook("encoder", "register_forward_pre_hook"),
    "hook of a layer": hook("encoder.layer.1"),
    "hook of a layer's dropout": hook("encoder.layer.1.output.dropout"),
    "hook of the pooler": hook("pooler"),
    "hook in the pooler": hook("pooler.dense"),
    "backward hook": full_backward_hook,
    "global hook": global_hook,
    "forward of the model": forward_of_an_instance(""),
    "forward of the embeddings": forward_of_an_instance("embeddings"),
    "forward of the pooler": forward_of_an_instance("pooler"),
    "forward of the encoder": forward_of_an_instance("encoder"),
    "forward of a class": of_a_class(type, "forward"),
    "forward of the embeddings' class": of_a_class(lambda model: type(model.embeddings), "forward"),
    "forward of the pooler's class": of_a_class(lambda model: type(model.pooler), "forward"),
    "forward of the encoder's class": of_a_class(lambda model: type(model.encoder), "forward"),
    "__call__ of all modules": of_a_class(lambda model: nn.Module, "__call__"),
    "forward of a class, wrapped by torch": wrapped_by_torch,
    "subclass": subclass,
    "embeddings": other_embeddings,
    "pooler": other_pooler,
    "output_hidden_states": outputs("output_hidden_states"),
    "output_attentions": outputs("_output_attentions"),
    "compiled": compiled,
    "adapter": adapter,
}
if V5:
    CHANGES["is_causal"] = is_causal


@pytest.mark.parametrize("used", [False, True], ids=["before the first call", "after a call"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_can_be_observed_is_called(name, used, is_direct, by_call, monkeypatch):
    if name == "adapter" and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    model = new()
    if used:
        encode(model)
        assert is_direct == [True]
        is_direct.clear()
    called = CHANGES[name](model, monkeypatch)
    try:
        found = encode(model)
        assert is_direct == [False]
        if called is not None:
            times = len(called)
            assert times > 0
        assert torch.equal(found, by_call(model))
        if called is not None:
            assert len(called) == 2 * times
    finally:
        if name == "global hook":
            model.removes()


def test_a_removed_hook(is_direct):
    model = new()
    handle = model.pooler.register_forward_hook(lambda *_: None)
    encode(model), handle.remove(), encode(model)
    assert is_direct == [False, True]


def test_decoders_and_models_that_are_not_accelerated(is_direct):
    decoder = new(is_decoder=True)
    for model in (decoder, tiny("Bert"), new("MPNet"), fastlm.accelerate(tiny("Bert"), unpad=False)):
        encode(model)
    with fastlm.use_backend(None):
        encode(new().double())
    assert not any(is_direct) and len(is_direct) == 5


def test_modes(is_direct, by_call):
    model = new()
    expected = encode(model)
    is_direct.clear()

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            return function(*arguments, **(options or {}))

    for context in (Functions(), FlopCounterMode(display=False), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            found = encode(model)
        assert torch.equal(found, expected) or isinstance(context, torch.autocast | FlopCounterMode)
    assert is_direct == [False] * 3 and not captured_outputs()


def test_one_dropout_in_training_mode(is_direct):
    model = new(hidden_dropout_prob=0.5)
    expected = encode(model)
    for dropout in (model.embeddings.dropout, model.encoder.layer[1].output.dropout):
        dropout.train()
        assert torch.equal(encode(model), expected)
        assert dropout.training and not model.training
        dropout.eval()
    model.train()
    assert torch.equal(encode(model), expected) and all(module.training for module in model.modules())
    assert all(is_direct)


def test_a_dropout_of_a_hook(is_direct):
    model = new()
    expected = encode(model)
    model.extra = nn.Dropout()
    model.embeddings.register_forward_hook(lambda module, arguments, x: model.extra(x))
    assert all(torch.equal(encode(model), expected) for _ in range(3)) and model.extra.training


def test_after_outputs_of_layers(is_direct, by_call):
    """What captures them stays on the modules."""
    model = new()
    with torch.no_grad():
        model(torch.tensor([[2, 7, 3]]), output_hidden_states=True)
    assert torch.equal(encode(model), by_call(model)) and is_direct == [True]


def change_data(model):
    model.embeddings.word_embeddings.weight.data = 2 * model.embeddings.word_embeddings.weight.data


def change_in_place(model):
    model.encoder.layer[1].output.dense.weight.mul_(2)


def resize(model):
    torch.manual_seed(3)
    model.resize_token_embeddings(150)
    model.embeddings.word_embeddings.weight.data.normal_()


def replace_table(model):
    table = model.embeddings.position_embeddings
    model.embeddings.position_embeddings = nn.Embedding(*table.weight.shape, _weight=2 * table.weight)


def replace_embeddings(model):
    torch.manual_seed(4)
    model.embeddings = tiny("Bert").embeddings


@torch.no_grad()
@pytest.mark.parametrize("change", [change_data, change_in_place, resize, replace_table, replace_embeddings])
def test_changes_are_followed(change, is_direct, by_call):
    model = new()
    before = encode(model)
    change(model)
    found = encode(model)
    assert is_direct == [True, True]
    assert torch.equal(found, by_call(model)) and not torch.equal(found, before)


def test_embeddings_of_another_dtype_than_the_layers(is_direct):
    model = new()
    model.encoder.bfloat16()
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        encode(model)
    assert is_direct == [False]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(copied, is_direct):
    model = new()
    before = encode(model)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    called = []
    model.register_forward_hook(lambda *_: called.append(None))
    assert torch.equal(encode(other), before) and not called and is_direct == [True, True]


def test_restored_and_accelerated_again(is_direct):
    model = new()
    found = encode(model)
    torch.testing.assert_close(encode(fastlm.restore(model)), found, rtol=1e-4, atol=1e-5)
    assert torch.equal(encode(fastlm.accelerate(model)), found)
    assert is_direct == [True, False, True]


def test_a_dropped_model_is_freed():
    model = new()
    encode(model)
    weight = weakref.ref(model.embeddings.word_embeddings.weight)
    del model
    gc.collect()
    assert weight() is None
