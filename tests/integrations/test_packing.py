"""Encoders that run without padding."""

import pytest
import torch

import fastlm
from fastlm.integrations import packing, parts, reporting
from tests.integrations.support import ENCODERS, V5, accelerated_copy, assert_close_gradients, ids, padded, tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def rows(monkeypatch):
    """The number of rows of each feed-forward block's input."""
    seen = []
    for name in ("gelu_mlp", "glu_mlp"):
        function = getattr(parts, name)

        def counted(x, *args, function=function, **kwargs):
            seen.append(x.shape[:-1].numel())
            return function(x, *args, **kwargs)

        monkeypatch.setattr(parts, name, counted)
    return seen


@pytest.mark.parametrize("family", ENCODERS)
def test_only_real_tokens_are_computed(family, rows):
    reference = tiny(family)
    accelerated = accelerated_copy(reference)
    x, mask = padded(17, 5, 1)
    for model in (accelerated, reference):
        model(x, attention_mask=mask)[0][mask.bool()].square().sum().backward()
    assert rows == [23] * reference.config.num_hidden_layers
    assert_close_gradients(accelerated, reference)
    assert (accelerated(x, attention_mask=mask)[0][mask == 0] == 0).all()


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "DistilBert", "ModernBert"])
def test_heads_on_packed_encoders(family, head):
    reference = tiny(family, head)
    accelerated = accelerated_copy(reference)
    x, mask = padded(17, 5, 9)
    actual, expected = accelerated(x, attention_mask=mask), reference(x, attention_mask=mask)
    for a, b in zip(actual.to_tuple(), expected.to_tuple(), strict=True):
        where = mask.bool() if a.shape[:2] == mask.shape else slice(None)
        torch.testing.assert_close(a[where], b[where], **CLOSE)


@pytest.mark.parametrize("family", [family for family in ("Bert", "Gte", "NomicBert") if family in ENCODERS])
def test_token_types_and_positions_given(family, rows):
    reference = tiny(family)
    accelerated = accelerated_copy(reference)
    x, mask = padded(17, 5, 1)
    inputs = {"token_type_ids": torch.randint(2, x.shape), "position_ids": torch.randint(40, x.shape)}
    actual, expected = (model(x, attention_mask=mask, **inputs)[0] for model in (accelerated, reference))
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **CLOSE)
    assert rows == [23, 23]


@pytest.mark.parametrize("family", ENCODERS)
def test_without_unpadding(family, rows):
    reference = tiny(family)
    accelerated = accelerated_copy(reference, unpad=False)
    x, mask = padded(17, 5, 1)
    actual, expected = (model(x, attention_mask=mask)[0] for model in (accelerated, reference))
    assert rows == [51] * reference.config.num_hidden_layers
    # A window may hide all keys from padding: transformers averages over all values then, fastlm returns 0.
    where = mask.bool() if family == "ModernBert" else ...
    torch.testing.assert_close(actual[where], expected[where], **CLOSE)
    assert not any("without padding" in entry.module for entry in fastlm.report(accelerated).entries)


@pytest.mark.skipif("Gte" not in ENCODERS, reason="this version of transformers has no GTE")
@pytest.mark.parametrize("as_dict", [True, False])
def test_a_pooler_inside_the_encoder_reads_the_first_tokens(as_dict, rows):
    reference = tiny("Gte", "ForSequenceClassification").gte
    accelerated, (x, mask) = accelerated_copy(reference), padded(17, 5, 9)
    actual, expected = (model(x, attention_mask=mask, return_dict=as_dict) for model in (accelerated, reference))
    assert rows == [31, 31] and len(actual) == len(expected) == 2
    torch.testing.assert_close(actual[1], expected[1], **CLOSE)


def test_masks_with_holes_and_of_every_type(rows):
    reference = tiny("Bert")
    accelerated = accelerated_copy(reference)
    x, mask = ids(3, 9), torch.rand(3, 9) < 0.6
    mask[:, 0] = True
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None, None].expand(-1, 1, 9, -1)
    masks = [mask, mask.long(), mask.float()]
    if V5:  # transformers 4 accepts no 4-D masks here
        masks += [mask[:, None, None], additive]
    for given in masks:
        torch.testing.assert_close(
            accelerated(x, attention_mask=given)[0][mask], reference(x, attention_mask=mask.long())[0][mask], **CLOSE
        )
    assert set(rows) == {int(mask.sum())}


@pytest.mark.parametrize(
    "case", ["no padding", "padding only", "begins with padding", "causal", "3-D mask", "hidden states", "attentions"]
)
def test_cases_that_keep_padding(case, rows):
    reference = tiny("Bert", "LMHeadModel", is_decoder=True) if case == "causal" else tiny("Bert")
    accelerated = accelerated_copy(reference)
    x, mask = padded(9, 5, tokens=9)
    inputs = {
        "attention_mask": {
            "no padding": torch.ones_like(x),
            "padding only": torch.zeros_like(x),
            "begins with padding": mask.flip(1),
        }.get(case, mask)
    }
    if case == "3-D mask":
        inputs["attention_mask"] = torch.ones(9, 9).tril().bool() & mask.bool()[:, None]
        inputs["attention_mask"] = inputs["attention_mask"][:, None] if V5 else inputs["attention_mask"]
    elif case == "hidden states":
        inputs["output_hidden_states"] = True
    elif case == "attentions":
        inputs["output_attentions"] = True
    actual, expected = accelerated(x, **inputs), reference(x, **inputs)
    assert rows == [18, 18]
    if case != "padding only":  # transformers averages over all keys, fastlm returns 0
        where = mask.flip(1).bool() if case == "begins with padding" else mask.bool()
        torch.testing.assert_close(actual[0][where], expected[0][where], **CLOSE)
    if case == "begins with padding":
        torch.testing.assert_close(actual.pooler_output, expected.pooler_output, **CLOSE)
    if case == "hidden states":
        rows.clear()
        accelerated(x, attention_mask=mask)  # transformers' hooks stay but capture nothing
        assert rows == [14, 14]


def test_a_hook_between_layers_prevents_packing(rows):
    accelerated = accelerated_copy(tiny("Bert"))
    x, mask = padded(9, 5, tokens=9)
    shapes = []
    handle = accelerated.encoder.layer[1].register_forward_hook(
        lambda module, args, out: shapes.append((out[0] if isinstance(out, tuple) else out).shape)
    )
    accelerated(x, attention_mask=mask)
    handle.remove()
    accelerated(x, attention_mask=mask)
    assert shapes == [(2, 9, 36)] and rows == [18, 18, 14, 14]


def test_dropout_and_checkpointing_of_packed_layers(rows):
    accelerated = accelerated_copy(tiny("Bert", attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.3)).train()
    accelerated.gradient_checkpointing_enable()
    x, mask = padded(9, 5, tokens=9)
    accelerated(x, attention_mask=mask)[0].sum().backward()
    assert rows == [14] * 4


def test_one_synchronization(monkeypatch):
    """The mask's values are read once, by `tolist`. No operator's output size depends on values."""
    read, operators, tolist = [], [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (read.append(x), tolist(x))[1])

    class RecordOperators(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operators.append(function)
            return function(*args, **(kwargs or {}))

    with RecordOperators():
        packed = packing.pack(padded(9, 5, tokens=9)[1].bool())
    assert packed.index.shape == (14,) and len(read) == 1
    assert torch.ops.aten.nonzero_static.default in operators
    assert not {
        torch.ops.aten.nonzero.default,
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.is_nonzero.default,
    } & set(operators)


@pytest.mark.parametrize("family", ENCODERS)
def test_the_report_selects_the_backend_by_head_dim(family, monkeypatch):
    """Not by the model's width, which may exceed the largest head_dim of a backend."""
    asked, decide = [], reporting.decide
    monkeypatch.setattr(reporting, "decide", lambda *call: (asked.append(call[-1]), decide(*call))[1])
    model = accelerated_copy(tiny(family))
    fastlm.report(model)
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    attention = [sizes for sizes in asked if hasattr(sizes, "packed")]
    assert {sizes.packed for sizes in attention} == {False, True}
    assert all((sizes.heads, sizes.head_dim) == (heads, width // heads) for sizes in attention)
