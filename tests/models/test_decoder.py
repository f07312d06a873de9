import json

import pytest
import torch
import transformers

import fastlm
from fastlm.benchmarking.accuracy import KeepFloat64
from fastlm.models import CausalLM, DecoderConfig, LlamaConfig, load_model
from fastlm.models.cache import KVCache
from tests.models.hugging_face import DECODERS, assert_within_twice_theirs, ours_like, tiny_decoder

DTYPES = [torch.float32, torch.bfloat16]
ROPE = {"rope_type": "default", "rope_theta": 5e3}
VARIANTS = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "wide heads": ("llama", {"head_dim": 20}),
    "tied projection": ("qwen2", {"tie_word_embeddings": True}),
    "tanh GELU": ("llama", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3}),
    "Llama 3's positions": (
        "llama",
        {
            "rope_parameters": ROPE
            | {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 24,
            }
        },
    ),
    "YaRN": (
        "qwen3",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}},
    ),
    "scaled positions": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "sliding layers": ("smollm3", {"use_sliding_window": True, "sliding_window": 5}),
    "no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "positions everywhere": ("smollm3", {"no_rope_layers": [1, 1, 1]}),
}
families = pytest.mark.parametrize("family", DECODERS)


def assert_close_to_exact(make, draw, dtype=torch.float32):
    assert_within_twice_theirs(make, draw, dtype, shifted=True, exact_attention="sdpa")


def tokens(*shape):
    return torch.randint(0, 131, shape)


def plain():
    """Two rows; one label in five is ignored."""
    ids = tokens(2, 17)
    return {"input_ids": ids}, ids.masked_fill(torch.rand(2, 17) < 0.2, -100), ...


def left_padded():
    """Three rows of 17, 12 and 1 real tokens. Nothing is predicted from padding: eager attention is not 0 there."""
    mask = torch.arange(17) >= torch.tensor([[0], [5], [16]])
    ids = tokens(3, 17)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
    predicted = mask & mask.roll(1, -1)
    return inputs, ids.masked_fill(~predicted, -100), mask


def embeddings():
    return {"inputs_embeds": torch.randn(2, 9, 48)}, tokens(2, 9), ...


@families
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_loss_and_gradients(family, dtype):
    assert_close_to_exact(lambda: tiny_decoder(family), plain, dtype)


@pytest.mark.parametrize("family, changes", VARIANTS.values(), ids=VARIANTS)
def test_variants(family, changes):
    assert_close_to_exact(lambda: tiny_decoder(family, **changes), plain)


def test_float64():
    theirs, ids = tiny_decoder("llama").double(), tokens(2, 17)
    with KeepFloat64():
        expected = theirs(ids).logits
    torch.testing.assert_close(ours_like(theirs)(ids).logits, expected, rtol=1e-6, atol=1e-6)  # tables in float32


@families
@pytest.mark.parametrize("draw", [left_padded, embeddings])
def test_inputs(family, draw):
    assert_close_to_exact(lambda: tiny_decoder(family), draw)


@families
def test_greedy_tokens(family):
    """With the cache, beyond the window, in a left-padded batch."""
    theirs = tiny_decoder(family)
    ours, ids = ours_like(theirs), tokens(3, 9)
    mask = (torch.arange(9) >= torch.tensor([[0], [4], [8]])).long()
    for inputs in ({}, {"attention_mask": mask}):
        expected = theirs.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0, **inputs)
        assert torch.equal(ours.generate(ids, max_new_tokens=30, **inputs), expected)


def test_generation_beyond_the_context_slides():
    ours, ids = ours_like(tiny_decoder("mistral", max_position_embeddings=16)), tokens(1, 9)
    generated = ours.generate(ids, max_new_tokens=20)
    for end in (18, 24, 29):
        assert generated[0, end - 1] == ours(generated[:, end - 17 : end - 1]).logits[0, -1].argmax()


@families
def test_cached_logits_equal_those_of_one_pass(family):
    """Whatever the sizes of the parts."""
    ours, ids = ours_like(tiny_decoder(family)), tokens(2, 40)
    expected = ours(ids).logits
    for parts in ([7, 1, 1, 13, 1, 1, 1, 15], [1] * 40, [30, 10]):
        cache, found = ours.new_cache(40), []
        with torch.no_grad():
            for part in torch.split(ids, parts, 1):
                found.append(ours(part, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)
        assert cache.length == 40


def test_a_layer_with_a_window_keeps_the_window_alone():
    cache = KVCache(2, 1000, windows=(4, None))
    for _ in range(100):
        new = torch.randn(1, 1, 3, 8)
        for layer in range(2):
            cache.update(layer, new, new)
        cache.length += 3
    assert cache.keys[0].shape[2] == cache.values[0].shape[2] == 9 and cache.keys[1].shape[2] == 1000


@families
def test_checkpoints_round_trip(family, tmp_path):
    theirs, ids = tiny_decoder(family), tokens(2, 17)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert type(ours) is CausalLM
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=0)
    assert torch.equal(CausalLM.from_pretrained(tmp_path / "ours")(ids).logits, ours(ids).logits)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_settings_of_transformers_4(family, tmp_path):
    """rope_theta and rope_scaling instead of rope_parameters give the same bits."""
    changes = {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}} if family == "llama" else {}
    theirs, ids = tiny_decoder(family, **changes), tokens(1, 17)
    theirs.save_pretrained(tmp_path)
    expected = load_model(tmp_path)(ids).logits
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["rope_parameters"]
    if family == "llama":
        settings |= {"rope_theta": 5e3, "rope_scaling": {"type": "linear", "factor": 4.0}}
    else:
        settings |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert torch.equal(load_model(tmp_path)(ids).logits, expected)


def test_recomputation_and_checkpointing_keep_the_gradients():
    ours, ids = ours_like(tiny_decoder("qwen3")).train(), tokens(2, 17)

    def gradients():
        ours.zero_grad(set_to_none=True)
        ours(ids, labels=ids).loss.backward()
        return [p.grad for p in ours.parameters()]

    expected = gradients()
    for level in (0, 2):
        ours.recompute = level
        torch.testing.assert_close(gradients(), expected)
    ours.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), expected)


def test_initialisation():
    config = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    ours = CausalLM(LlamaConfig(**config, num_attention_heads=4))
    assert (ours.model.norm.weight == 1).all() and abs(ours.lm_head.weight.std().item() - 0.02) < 0.002
    gemma = CausalLM(fastlm.models.Gemma3Config(**config))
    assert (gemma.model.norm.weight == 0).all() and gemma.lm_head.weight is gemma.model.embed_tokens.weight


SETTINGS = {"hidden_size": 48, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_type": "lama"}, "model_type: expected one of llama, .*, got 'lama'; did you mean 'llama'?"),
        ({"model_type": None}, "model_type: expected one of llama, .*, got None"),
        ({"hidden_act": "tanh"}, "hidden_act: expected one of silu, .*, got 'tanh'"),
        ({"num_key_value_heads": 3}, "num_attention_heads: expected a multiple of num_key_value_heads = 3, got 4"),
        ({"hidden_size": 50}, "hidden_size: expected a multiple of num_attention_heads = 4, got 50"),
        (
            {"layer_types": ["full_attention"]},
            "layer_types: expected num_hidden_layers = 32 of full_attention, .*, got 1 entries",
        ),
        (
            {"num_hidden_layers": 1, "layer_types": ["chunked"]},
            "layer_types: expected num_hidden_layers = 1 of .*, got 'chunked'",
        ),
        (
            {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            "sliding_window: expected an integer >= 1, as layer_types has sliding_attention, got null",
        ),
        (
            {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 0},
            "sliding_window: expected an integer >= 1, got 0",
        ),
        (
            {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
            "final_logit_softcapping: expected None, the only supported value, got 30.0",
        ),
        (
            {"model_type": "gemma2", "attn_logit_softcapping": 0},
            "attn_logit_softcapping: expected a finite number > 0 or null, got 0",
        ),
        (
            {"model_type": "gemma2", "final_logit_softcapping": "30"},
            "final_logit_softcapping: expected a finite number > 0 or null, got '30'",
        ),
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected a finite number > 0, got 0"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected a JSON object or null, got 'linear'"),
        ({"rope_scaling": {"type": "lineal"}}, "rope_type: expected one of .*, got 'lineal'; did you mean 'linear'?"),
        ({"rope_scaling": {"type": "linear"}}, "factor: expected a finite number above 0, got None"),
        (
            {"partial_rotary_factor": 0.25},
            "partial_rotary_factor: expected 1 or null, got 0.25",
        ),
    ],
)
def test_settings_that_are_not_supported(settings, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        DecoderConfig.from_dict({"model_type": "llama", **SETTINGS, **settings})
