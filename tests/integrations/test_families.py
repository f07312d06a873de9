"""The table of families against transformers' classes, and a family that only a new entry adds."""

import copy
import dataclasses
import functools
import importlib
import inspect
import itertools

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

import fastlm
from fastlm.integrations.families import BERT, FAMILIES, GPT2, parent
from fastlm.integrations.parts import PROJECTIONS
from tests.integrations.support import (
    DECODERS,
    ENCODERS,
    SETTINGS,
    assert_close_gradients,
    config_class,
    model_class,
    tiny,
)

HOMES = {family: importlib.import_module(model_class(family).__module__).__name__ for family in SETTINGS}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


TABLES = ("position_embeddings_global", "position_embeddings_local")  # of Gemma 3 in transformers 4


missing = object()


def value_at(module, path):
    return functools.reduce(lambda owner, name: getattr(owner, name, missing), path.split("."), module)


def parameters_of(layer):
    return inspect.signature(type(layer).forward).parameters


def layer_of(family, **changes):
    """The last layer of a model of transformers that is not accelerated, and its description."""
    description = FAMILIES[HOMES[family]]
    model = tiny(family, **changes)
    return [module for module in model.modules() if type(module).__name__ == description.layer][-1], description


def test_every_family_has_a_model_in_these_tests():
    assert set(HOMES.values()) == set(FAMILIES)


@pytest.mark.parametrize("family", SETTINGS)
def test_classes_and_modules_exist(family):
    layer, description = layer_of(family)
    home = importlib.import_module(HOMES[family])
    assert hasattr(home, description.layer) and all(hasattr(home, name) for name in description.heads)
    if description.encoder is not None:
        encoder = next(m for m in tiny(family).modules() if type(m).__name__ == description.encoder)
        assert type(encoder.get_submodule(description.layers)[0]).__name__ == description.layer
    projections = {*description.qkv, description.out, description.gate, description.up, description.down} - {None}
    norms = {value for field, value in vars(description).items() if field.endswith("_norm")} - {None}
    dropouts = {description.attention_dropout, description.out_dropout} - {None}
    dropouts |= {description.hidden_dropout, description.mlp_dropout} - {None}
    norm = getattr(home, description.norm_class) if description.norm_class else nn.LayerNorm
    if description.positions == "rotary":
        dropouts.remove(description.attention_dropout)
        assert layer.get_submodule(description.attention).attention_dropout == 0
    kinds_of_dropout = [nn.Dropout, nn.Identity]  # the second in ModernBERT without dropout
    for paths, kinds in ((projections, PROJECTIONS[description.layout]), (norms, [norm]), (dropouts, kinds_of_dropout)):
        for path in paths:
            assert type(layer.get_submodule(path)) in kinds
    # Every module with parameters is described.
    assert projections | norms == {
        name for name, module in layer.named_modules() if any(True for _ in module.parameters(recurse=False))
    }
    assert callable(getattr(layer.get_submodule(parent(description.activation)), description.activation.split(".")[-1]))
    attention = layer.get_submodule(description.attention)
    if description.num_heads is None:
        heads = 3 * 3 if len(description.qkv) == 1 else 3
        assert getattr(attention, description.head_dim) * heads == layer.get_submodule(description.qkv[0]).out_features
    else:
        assert getattr(attention, description.num_heads) == 3
    causal = next((vars(attention)[name] for name in description.causal if name in vars(attention)), False)
    assert causal is (family == "GPT2" or family in DECODERS)
    for name in (description.rotates, description.softcap):
        assert name is None or getattr(attention, name) in (None, 0, 1)
    windows = [value_at(attention, name) for name in description.window]
    assert len([window for window in windows if window is not missing]) == min(1, len(windows))
    assert set(windows) <= {None, 5, (-1, -1), missing}


@pytest.mark.parametrize("family", SETTINGS)
def test_output_projections_are_where_heads_have_them(family):
    description = FAMILIES[HOMES[family]]
    for name, head in description.heads.items():
        kind = getattr(importlib.import_module(HOMES[family]), name)
        decoder = {"is_decoder": head.shifted} if family in ENCODERS and family != "DistilBert" else {}
        model = kind(config_class(family)(**SETTINGS[family], **decoder))
        projection = model.get_submodule(head.projection)
        assert projection is model.get_output_embeddings()
        assert head.loss_module is None or isinstance(model.get_submodule(head.loss_module), nn.CrossEntropyLoss)


@pytest.mark.parametrize("family", SETTINGS)
def test_layers_return_what_the_table_says_for_this_version(family):
    layer, description = layer_of(family, attn_implementation="eager")
    x, returned = torch.randn(2, 5, 36), description.returned()
    inputs = {"attn_mask": torch.ones(2, 5)} if family == "DistilBert" else {}  # it requires one
    if description.positions == "rotary":
        table, names = torch.randn(1, 5, layer.get_submodule(description.attention).head_dim), parameters_of(layer)
        inputs = {name: (table, table) for name in ("position_embeddings", *TABLES) if name in names}
        if "sliding_window_mask" in names:  # ModernBERT of transformers 4 needs all of them
            mask = torch.zeros(2, 1, 5, 5)
            inputs = {"attention_mask": mask, "sliding_window_mask": mask, "position_ids": torch.arange(5)[None]}
    if returned is None:
        assert layer(x, **inputs).shape == x.shape
        return
    result = layer(x, **inputs)
    assert type(result) is tuple and result[0].shape == x.shape
    shapes = {"hidden_states": (2, 5, 36), "attentions": (2, 3, 5, 5)}
    result = layer(x, **inputs, output_attentions=True)
    assert [output.shape for output in result] == [shapes[name] for name in returned]


@pytest.mark.parametrize(
    ("family", "version", "returned"),
    [
        ("GPT2", "4.57.6", ("hidden_states", "attentions")),
        ("GPT2", "5.2.0", ("hidden_states", "attentions")),
        ("GPT2", "5.3.0.dev0", None),
        ("GPT2", "5.24.0", None),
        ("Bert", "4.57.0", ("hidden_states", "attentions")),
        ("Bert", "5.0.0rc1", None),
        ("DistilBert", "4.57.6", ("attentions", "hidden_states")),
        ("DistilBert", "5.10.2", None),
        ("Qwen3", "4.57.0", None),
        ("Gemma2", "4.57.6", ("hidden_states", "attentions")),
    ],
)
def test_what_layers_return_depends_on_the_version(family, version, returned):
    assert FAMILIES[HOMES[family]].returned(version) == returned


def test_copies_of_a_model_share_the_descriptions():
    assert copy.deepcopy(GPT2) is GPT2 and copy.deepcopy(BERT.heads["BertForMaskedLM"]) is BERT.heads["BertForMaskedLM"]


# A family that transformers does not have, for every combination of norm place, projections and layout.


class ToyAttention(nn.Module):
    def __init__(self, fused, make):
        super().__init__()
        self.is_causal, self.heads, self.scaling = True, 3, 12**-0.5
        if fused:
            self.qkv_proj = make(36, 108)
        else:
            self.q_proj, self.k_proj, self.v_proj = make(36, 36), make(36, 36), make(36, 36)
        self.o_proj, self.drop = make(36, 36), nn.Dropout(0.0)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if hasattr(self, "qkv_proj"):
            parts = self.qkv_proj(hidden_states).chunk(3, -1)
        else:
            parts = [projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scaling)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class ToyMLP(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.up_proj, self.act, self.down_proj = make(36, 50), nn.GELU(approximate="tanh"), make(50, 36)

    def forward(self, x):
        return self.down_proj(self.act(self.up_proj(x)))


class ToyLayer(GradientCheckpointingLayer):
    def __init__(self, pre_norm, fused, make):
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn, self.mlp = ToyAttention(fused, make), ToyMLP(make)
        self.norm1, self.norm2 = nn.LayerNorm(36), nn.LayerNorm(36)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        x = hidden_states
        if self.pre_norm:
            x = x + self.self_attn(self.norm1(x), attention_mask=attention_mask, **kwargs)[0]
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.self_attn(x, attention_mask=attention_mask, **kwargs)[0])
        return self.norm2(x + self.mlp(x))


TOY = dataclasses.replace(
    GPT2,
    module=__name__,
    layer="ToyLayer",
    heads={},
    returns={"4.57": "hidden_states"},
    attention="self_attn",
    num_heads="heads",
    attention_dropout="self_attn.drop",
    out="self_attn.o_proj",
    out_dropout=None,
    attention_norm="norm1",
    up="mlp.up_proj",
    activation="mlp.act",
    down="mlp.down_proj",
    mlp_dropout=None,
    mlp_norm="norm2",
)
PROJECTION = {"linear": nn.Linear, "conv1d": lambda inputs, outputs: Conv1D(outputs, inputs)}


@pytest.mark.parametrize(
    ("place", "qkv", "layout"), list(itertools.product(("pre", "post"), ("fused", "separate"), ("linear", "conv1d")))
)
def test_a_family_is_added_by_one_entry(place, qkv, layout, monkeypatch):
    names = ("qkv_proj",) if qkv == "fused" else ("q_proj", "k_proj", "v_proj")
    paths = tuple(f"self_attn.{name}" for name in names)
    monkeypatch.setitem(FAMILIES, __name__, dataclasses.replace(TOY, norm_place=place, layout=layout, qkv=paths))
    reference = nn.ModuleList([ToyLayer(place == "pre", qkv == "fused", PROJECTION[layout]) for _ in range(2)])
    accelerated = fastlm.accelerate(copy.deepcopy(reference))
    assert not fastlm.report(accelerated).left_alone and len(fastlm.report(accelerated).entries) == 2 * (len(paths) + 5)
    x = torch.randn(2, 7, 36)
    for place_of_hook in (None, *(name for name, _ in reference[0].named_modules() if name)):
        results, handles = [], []
        for model in (accelerated, reference):
            if place_of_hook not in (None, "self_attn.drop"):  # that module is not called
                module, seen = model[0].get_submodule(place_of_hook), []
                handles.append(module.register_forward_hook(lambda *call, seen=seen: seen.append(1)))
            model.zero_grad()
            y = model[1](model[0](x))
            y.square().mean().backward()
            results.append(y)
            if handles:
                assert seen == [1]
        torch.testing.assert_close(*results, **CLOSE)
        assert_close_gradients(accelerated, reference)
        for handle in handles:
            handle.remove()
