import pytest
import torch

from fastlm.models import rope_tables

CONFIG = {
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
PARAMETERS = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    {"rope_type": "llama3", "rope_theta": 100.0} | LLAMA3,
    {"rope_type": "llama3", "rope_theta": 500000.0} | LLAMA3,
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "yarn",
        "rope_theta": 50.0,
        "factor": 2.5,
        "original_max_position_embeddings": 400,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "attention_factor": 0.75},
    {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.5},
]


def transformers_tables(parameters, positions):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    transformers = pytest.importorskip("transformers", "5")
    config = transformers.LlamaConfig(**CONFIG, rope_parameters=dict(parameters))
    embedding = llama.LlamaRotaryEmbedding(config)
    return config, embedding(torch.zeros(1), positions if positions.dim() == 2 else positions[None])


@pytest.mark.parametrize("positions", ["short", "long", "batch"])
@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: p["rope_type"])
def test_as_transformers_computes_them(parameters, positions):
    """Within a few roundings of the frequencies: an angle is position times frequency."""
    positions = {
        "short": torch.arange(20),
        "long": torch.arange(150),
        "batch": torch.arange(12).view(1, 12) + torch.tensor([[0], [70]]),
    }[positions]
    config, expected = transformers_tables(parameters, positions)
    contents = CONFIG | {"rope_parameters": parameters}
    old = CONFIG | {"rope_theta": parameters["rope_theta"], "rope_scaling": {**parameters, "rope_theta": None}}
    for given in (config, contents, old):
        tables = rope_tables(given, positions)
        for ours, theirs in zip(tables, expected, strict=True):
            assert ours.shape == theirs.shape and ours.dtype == torch.float32
            assert (ours - theirs).abs().max() <= int(positions.max()) * 2**-22 + 2**-21


def test_the_first_part_of_a_head():
    positions = torch.arange(7)
    whole = rope_tables({"head_dim": 8, "rope_theta": 100.0}, positions)
    part = rope_tables({"head_dim": 32, "rope_theta": 100.0, "partial_rotary_factor": 0.25}, positions)
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True)) and whole[0].shape == (1, 7, 8)


def test_settings_of_each_type_of_layer():
    full, sliding = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, {"rope_theta": 1e4}
    config = {"head_dim": 8, "rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
    for name, parameters in (("full_attention", full), ("sliding_attention", sliding)):
        alone = rope_tables({"head_dim": 8, "rope_parameters": parameters}, torch.arange(5))
        assert torch.equal(rope_tables(config, torch.arange(5), layer_type=name)[0], alone[0])
    with pytest.raises(ValueError, match="layer_type: expected one of 'full_attention', 'sliding_attention', got None"):
        rope_tables(config, torch.arange(5))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type: expected one of 'default', .*, got 'longrope'"),
        ({"rope_scaling": {"type": "lineer"}}, "rope_type: .*; did you mean 'linear'?"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "rope_type: expected one of 'default', .*, got list"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor: expected a finite number above 0, got None"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": -1}},
            "factor: expected a finite number above 0, got -1",
        ),
        ({"rope_parameters": [1]}, "rope_parameters: expected a dict, got list"),
        ({"rope_theta": 0}, "rope_theta: expected a finite number above 0, got 0"),
        ({"head_dim": None}, "hidden_size: expected an integer of 1 or more, got None"),
        ({"head_dim": 9}, "partial_rotary_factor: expected an even part of head_dim 9, 2 or more, got 9"),
    ],
)
def test_settings_that_are_not_supported_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        rope_tables({"head_dim": 8} | changed, torch.arange(3))


@pytest.mark.parametrize(
    "positions, message",
    [
        (torch.zeros(3), "positions: expected integers, got torch.float32"),
        (torch.arange(8).view(2, 2, 2), r"positions: expected shape \(tokens,\) or \(batch, tokens\), got \(2, 2, 2\)"),
        ([0, 1], "positions: expected a tensor, got list"),
    ],
)
def test_wrong_positions_are_named(positions, message):
    with pytest.raises(ValueError, match=message):
        rope_tables({"head_dim": 8}, positions)
