"""ModernBERT: windows, packed tokens, the layer without a norm, a fused gate, sparse prediction."""

import copy

import pytest
import torch
from torch import nn

import fastlm
from fastlm.integrations import attention, layers
from tests.integrations.support import (
    V5,
    accelerated_copy,
    assert_close_gradients,
    assert_within_twice,
    ids,
    padded,
    tiny,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
WINDOWS = [None, (4, 4), (4, 4), None]
OPERATORS = {"attention", "rotary", "linear", "layernorm_residual", "glu_mlp", "linear_cross_entropy"}


@pytest.fixture
def windows(monkeypatch):
    """By operator, the windows of its calls."""
    seen = {"attention": [], "attention_varlen": []}
    for name, calls in seen.items():
        function = getattr(fastlm, name)

        def recorded(*args, function=function, calls=calls, **named):
            assert named.get("mask") is None
            calls.append(named.get("window"))
            return function(*args, **named)

        monkeypatch.setattr(layers, name, recorded)
        if name == "attention":
            monkeypatch.setattr(attention, "attention_operator", recorded)
    return seen


def assert_same(accelerated, reference, where=..., **inputs):
    for model in (accelerated, reference):
        model.zero_grad()
        model(**inputs)[0][where].square().sum().backward()
    torch.testing.assert_close(accelerated(**inputs)[0][where], reference(**inputs)[0][where], **CLOSE)
    assert_close_gradients(accelerated, reference)


def left_padded():
    x, mask = padded(17, 5, 9)
    x, mask = x.flip(1), mask.flip(1)
    return {"input_ids": x, "attention_mask": mask}, x.masked_fill(mask == 0, -100), mask.bool()


def test_left_padding():
    assert_within_twice(lambda: tiny("ModernBert", "ForMaskedLM"), left_padded)


def test_report():
    report = fastlm.report(accelerated_copy(tiny("ModernBert", "ForMaskedLM")))
    assert not report.left_alone and {entry.operator for entry in report.replaced} == OPERATORS
    norms = [entry.module for entry in report.replaced if entry.operator == "layernorm_residual"]
    assert len(norms) == 2 * 4 - 1 and "model.layers.0.attn_norm" not in norms


# Padding and windows


def test_packed_layers_have_windows(windows):
    reference = tiny("ModernBert")
    accelerated, (x, mask) = accelerated_copy(reference), padded(17, 5, 9)
    assert_same(accelerated, reference, mask.bool(), input_ids=x, attention_mask=mask)
    assert windows == {"attention": [], "attention_varlen": WINDOWS * 2}


@pytest.mark.parametrize("padding", [False, True])
def test_layers_without_padding_have_windows(padding, windows):
    """Masks of tokens × tokens are not made, except by transformers 4 where padding is computed."""
    reference = tiny("ModernBert")
    accelerated, (x, mask) = accelerated_copy(reference), padded(17, 17)
    assert_same(accelerated, reference, input_ids=x, attention_mask=mask if padding else None)
    # The masks of transformers 4 say no windows, so sequences are packed without padding, too.
    assert windows["attention" if V5 else "attention_varlen"] == WINDOWS * 2


@pytest.mark.skipif(not V5, reason="transformers 4 makes masks of tokens × tokens")
@pytest.mark.parametrize("case", ["unpad=False", "begins with padding", "hole"])
def test_padded_layers_have_windows(case, windows):
    reference = tiny("ModernBert")
    accelerated, (x, mask) = accelerated_copy(reference, unpad=case != "unpad=False"), padded(17, 5, 9)
    if case == "begins with padding":
        mask = mask.flip(1)
    elif case == "hole":
        mask[0, 4:8] = 0
    assert_same(accelerated, reference, mask.bool(), input_ids=x, attention_mask=mask)
    assert windows == {"attention": WINDOWS * 2, "attention_varlen": []}


def test_a_hole_in_the_mask_does_not_change_distances():
    """Packing would bring tokens on both sides of it into each other's window."""
    reference = tiny("ModernBert")
    accelerated, (x, mask) = accelerated_copy(reference), padded(17, 5, 9)
    mask[0, 2:12] = 0
    assert_same(accelerated, reference, mask.bool(), input_ids=x, attention_mask=mask)


def test_positions_and_embeddings_given():
    reference = tiny("ModernBert")
    accelerated, (x, mask) = accelerated_copy(reference), padded(17, 5, 9)
    for positions in (torch.arange(17)[None] + 7, torch.randint(40, x.shape)):
        assert_same(accelerated, reference, mask.bool(), input_ids=x, attention_mask=mask, position_ids=positions)
    found = []
    for model in (accelerated, reference):
        embeds = torch.randn(3, 17, 36, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model(inputs_embeds=embeds, attention_mask=mask)[0][mask.bool()].square().sum().backward()
        found.append(embeds.grad[mask.bool()])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_wrong_arguments_raise_as_before():
    model, x = accelerated_copy(tiny("ModernBert")), ids(2, 7)
    for inputs in ({}, {"input_ids": x, "inputs_embeds": torch.randn(2, 7, 36)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**inputs, attention_mask=torch.ones_like(x))


@pytest.mark.parametrize("place", ["embeddings", "embeddings.tok_embeddings", "final_norm"])
def test_a_hook_beside_the_layers_sees_padded_hidden_states(place):
    model, (x, mask) = accelerated_copy(tiny("ModernBert")), padded(17, 5)
    shapes = []
    handle = model.get_submodule(place).register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    model(x, attention_mask=mask)
    assert shapes == [(2, 17, 36)]
    assert [entry.reason for entry in fastlm.report(model).left_alone] == [f"has a hook at {place}"]
    handle.remove()
    assert not fastlm.report(model).left_alone


def test_hidden_states_requested_by_the_configuration():
    reference = tiny("ModernBert", output_hidden_states=True)
    accelerated, (x, mask) = accelerated_copy(reference), padded(17, 5)
    actual, expected = (model(x, attention_mask=mask).hidden_states for model in (accelerated, reference))
    assert len(actual) == len(expected) == 5
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()], **CLOSE)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_classification(pooling, side):
    reference = tiny("ModernBert", "ForSequenceClassification", classifier_pooling=pooling, num_labels=3)
    accelerated, (x, mask) = accelerated_copy(reference), padded(17, 5, 9)
    mask = mask if side == "right" else mask.flip(1)
    assert_same(accelerated, reference, input_ids=x, attention_mask=mask, labels=torch.tensor([0, 2, 1]))


@pytest.mark.skipif(not V5, reason="ModernBERT of transformers 4 does not use the attention interface")
def test_the_attention_alone():
    """attn_implementation="fastlm" without accelerate: tokens on both sides of the window's edge."""
    reference = tiny("ModernBert")
    attention_alone, (x, mask) = copy.deepcopy(reference), padded(17, 5, 9)
    attention_alone.set_attn_implementation("fastlm")
    for inputs in ({}, {"attention_mask": mask}, {"attention_mask": mask.flip(1)}):
        where = inputs.get("attention_mask", torch.ones_like(x)).bool()
        assert_same(attention_alone, reference, where, input_ids=x, **inputs)
    assert_same(attention_alone, reference, input_ids=ids(2, 5))  # as many as the keys up to the query's own


# Configurations


BIASES = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "decoder_bias": False, "classifier_bias": True}


@pytest.mark.parametrize(
    "changes",
    [BIASES, {"hidden_activation": "gelu_pytorch_tanh"}, {"hidden_activation": "silu"}, {"local_attention": 2}],
    ids=lambda changes: next(iter(changes)),
)
def test_configurations(changes):
    assert_within_twice(lambda: tiny("ModernBert", "ForMaskedLM", **changes), left_padded)


def test_other_activations_are_not_replaced():
    reference = tiny("ModernBert", hidden_activation="relu2")
    accelerated, (x, mask) = accelerated_copy(reference), padded(17, 5)
    left = fastlm.report(accelerated).left_alone
    assert {(entry.operator, entry.reason) for entry in left} == {
        ("glu_mlp", "mlp.act is not a plain SiLU, GELU or ReLU")
    }
    assert_same(accelerated, reference, mask.bool(), input_ids=x, attention_mask=mask)


def test_a_norm_put_into_the_first_layer_later():
    reference = tiny("ModernBert")
    accelerated, x = accelerated_copy(reference), ids(2, 17)
    assert_same(accelerated, reference, input_ids=x)
    norm = nn.LayerNorm(36, bias=False)
    nn.init.normal_(norm.weight)
    for model in (accelerated, reference):
        model.layers[0].attn_norm = copy.deepcopy(norm)
    assert_same(accelerated, reference, input_ids=x)
    assert "layers.0.attn_norm" in {entry.module for entry in fastlm.report(accelerated).replaced}


@pytest.mark.parametrize("ignored", [-100, 7])
def test_sparse_prediction(ignored):
    """Labels of `sparse_pred_ignore_index` have no loss, and those of -100 neither."""
    settings = {"sparse_prediction": True, "sparse_pred_ignore_index": ignored}
    reference = tiny("ModernBert", "ForMaskedLM", **settings).train()
    accelerated, (x, mask) = accelerated_copy(reference), padded(17, 5, 9)
    labels = x.masked_fill((mask == 0) | (torch.rand(x.shape) < 0.5), ignored)
    if ignored != -100:
        labels[0, :3] = -100
    losses = [model(x, attention_mask=mask, labels=labels).loss for model in (accelerated, reference)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    assert_close_gradients(accelerated, reference)
    actual, expected = (model.eval()(x, attention_mask=mask, labels=labels) for model in (accelerated, reference))
    torch.testing.assert_close(actual.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(actual.loss, expected.loss)


def test_another_loss_is_called():
    reference = tiny("ModernBert", "ForMaskedLM").train()
    reference.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    accelerated, x = accelerated_copy(reference), ids(2, 7)
    assert {entry.reason for entry in fastlm.report(accelerated).left_alone} == {"has a loss function of its own"}
    torch.testing.assert_close(accelerated(x, labels=x).loss, reference(x, labels=x).loss)


# Adapters


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora(order):
    peft = pytest.importorskip("peft", reason="pip install 'fastlm[test]'")
    config = peft.LoraConfig(r=2, target_modules=["Wqkv", "Wi", "Wo"], init_lora_weights=False, lora_dropout=0.0)
    reference, adapted = tiny("ModernBert", "ForMaskedLM"), []
    for accelerates in (True, False):
        model = copy.deepcopy(reference)
        if accelerates and order == "before":
            fastlm.accelerate(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config).train()
        if accelerates and order == "after":
            fastlm.accelerate(model)
        adapted.append(model)
    left = fastlm.report(adapted[0]).left_alone
    assert {entry.operator for entry in left} == {"linear", "glu_mlp"} and len(left) == 4 * 3
    x, mask = padded(17, 5, 9)
    for model in adapted:
        model(input_ids=x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100)).loss.backward()
    assert_close_gradients(*adapted)
    merged = adapted[0].merge_and_unload()
    assert not fastlm.report(merged).left_alone
    torch.testing.assert_close(merged.eval()(x).logits, adapted[1].eval()(input_ids=x).logits, rtol=1e-3, atol=1e-4)


def test_a_frozen_model_with_a_trained_head():
    """Halves of a weight that needs no gradient."""
    reference = tiny("ModernBert", "ForTokenClassification")
    reference.model.requires_grad_(False)
    accelerated, (x, mask) = accelerated_copy(reference), padded(17, 5)
    assert_same(accelerated, reference, mask.bool(), input_ids=x, attention_mask=mask)


def test_the_window_of_published_models():
    """±64, in sequences that are longer than a window, as long, and shorter."""
    reference = tiny("ModernBert", local_attention=128, max_position_embeddings=8192)
    accelerated, (x, mask) = accelerated_copy(reference), padded(300, 129, 40, tokens=300)
    assert_same(accelerated, reference, mask.bool(), input_ids=x, attention_mask=mask)
