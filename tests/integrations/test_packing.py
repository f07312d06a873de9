"""Encoders on the real tokens alone."""

import pytest
import torch

import fastlm
from fastlm.integrations import reporting
from fastlm.integrations import packing
from tests.integrations.accelerated import ENCODERS, V5, accelerated, assert_close_gradients, ids, padded, tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def rows(monkeypatch):
    """How many rows each feed-forward block was given."""
    seen, function = [], fastlm.gelu_mlp
    monkeypatch.setattr(
        fastlm,
        "gelu_mlp",
        lambda x, *args, **kwargs: (seen.append(x.shape[:-1].numel()), function(x, *args, **kwargs))[1],
    )
    return seen


@pytest.mark.parametrize("family", ENCODERS)
def test_only_real_tokens_are_computed(family, rows):
    theirs = tiny(family)
    ours = accelerated(theirs)
    x, mask = padded(17, 5, 1)
    for model in (ours, theirs):
        model(x, attention_mask=mask)[0][mask.bool()].square().sum().backward()
    assert rows == [23, 23]
    assert_close_gradients(ours, theirs)
    assert (ours(x, attention_mask=mask)[0][mask == 0] == 0).all()


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "DistilBert"])
def test_every_head_gets_what_it_reads(family, head):
    theirs = tiny(family, head)
    ours = accelerated(theirs)
    x, mask = padded(17, 5, 9)
    own, other = ours(x, attention_mask=mask), theirs(x, attention_mask=mask)
    for a, b in zip(own.to_tuple(), other.to_tuple(), strict=True):
        where = mask.bool() if a.shape[:2] == mask.shape else slice(None)
        torch.testing.assert_close(a[where], b[where], **CLOSE)


def test_masks_with_holes_and_of_every_type(rows):
    theirs = tiny("Bert")
    ours = accelerated(theirs)
    x, mask = ids(3, 9), torch.rand(3, 9) < 0.6
    mask[:, 0] = True
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None, None].expand(-1, 1, 9, -1)
    for given in (
        mask,
        mask.long(),
        mask.float(),
        *((mask[:, None, None], additive) if V5 else ()),
    ):  # transformers 4 takes no 4-D ones here
        torch.testing.assert_close(
            ours(x, attention_mask=given)[0][mask], theirs(x, attention_mask=mask.long())[0][mask], **CLOSE
        )
    assert set(rows) == {int(mask.sum())}


@pytest.mark.parametrize(
    "case", ["no padding", "nothing real", "begins with padding", "causal", "3-D mask", "hidden states", "attentions"]
)
def test_where_padding_stays(case, rows):
    theirs = tiny("Bert", "LMHeadModel", is_decoder=True) if case == "causal" else tiny("Bert")
    ours = accelerated(theirs)
    x, mask = padded(9, 5, tokens=9)
    inputs = {
        "attention_mask": {
            "no padding": torch.ones_like(x),
            "nothing real": torch.zeros_like(x),
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
    own, other = ours(x, **inputs), theirs(x, **inputs)
    assert rows == [18, 18]
    if case != "nothing real":  # the mean of all keys there, 0 here
        where = mask.flip(1).bool() if case == "begins with padding" else mask.bool()
        torch.testing.assert_close(own[0][where], other[0][where], **CLOSE)
    if case == "begins with padding":
        torch.testing.assert_close(own.pooler_output, other.pooler_output, **CLOSE)
    if case == "hidden states":
        rows.clear()
        ours(x, attention_mask=mask)  # transformers' hooks stay, and see nothing from here on
        assert rows == [14, 14]


def test_a_hook_between_the_layers_sees_whole_batches(rows):
    ours = accelerated(tiny("Bert"))
    x, mask = padded(9, 5, tokens=9)
    shapes = []
    handle = ours.encoder.layer[1].register_forward_hook(
        lambda module, args, out: shapes.append((out[0] if isinstance(out, tuple) else out).shape)
    )
    ours(x, attention_mask=mask)
    handle.remove()
    ours(x, attention_mask=mask)
    assert shapes == [(2, 9, 36)] and rows == [18, 18, 14, 14]


def test_dropout_and_checkpointing_of_packed_layers(rows):
    ours = accelerated(tiny("Bert", attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.3)).train()
    ours.gradient_checkpointing_enable()
    x, mask = padded(9, 5, tokens=9)
    ours(x, attention_mask=mask)[0].sum().backward()
    assert rows == [14] * 4


def test_gather_and_scatter_are_each_others_gradient():
    index = torch.tensor([0, 2, 3, 7])
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.Gather.apply, (x, index)) and torch.autograd.gradgradcheck(
        packing.Gather.apply, (x, index)
    )
    assert torch.autograd.gradcheck(packing.Scatter.apply, (y, index, 8)) and torch.autograd.gradgradcheck(
        packing.Scatter.apply, (y, index, 8)
    )


def test_one_synchronisation(monkeypatch):
    """`tolist` is where values of the mask become numbers, once; no operator's size depends on a value."""
    read, operators, tolist = [], [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (read.append(x), tolist(x))[1])

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operators.append(function)
            return function(*args, **(kwargs or {}))

    with Watching():
        packed = packing.pack(padded(9, 5, tokens=9)[1].bool())
    assert packed.index.shape == (14,) and len(read) == 1
    assert torch.ops.aten.nonzero_static.default in operators
    assert not {
        torch.ops.aten.nonzero.default,
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.is_nonzero.default,
    } & set(operators)


@pytest.mark.parametrize("family", ENCODERS)
def test_the_report_selects_backends_by_the_width_of_the_heads(family, monkeypatch):
    """A backend that supports heads up to 256 wide does not refuse a model that is wider."""
    asked, decide = [], reporting.decide
    monkeypatch.setattr(reporting, "decide", lambda *call: (asked.append(call[-1]), decide(*call))[1])
    model = accelerated(tiny(family))
    fastlm.report(model)
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    attention = [sizes for sizes in asked if hasattr(sizes, "packed")]
    assert {sizes.packed for sizes in attention} == {False, True}
    assert all((sizes.heads, sizes.head_dim) == (heads, width // heads) for sizes in attention)
