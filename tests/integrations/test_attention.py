"""attn_implementation="fastlm": masks and attention, in models that fastlm describes and in others."""

import copy

import pytest
import torch
import transformers
from transformers import masking_utils

import fastlm
import fastlm.integrations.transformers  # registers the name
from fastlm.integrations import attention
from tests.integrations.support import V5, ids, padded, tiny
from tests.models.hugging_face import lively

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LLAMA = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def pair(model):
    """The model with transformers' "eager" attention, and a copy with fastlm's."""
    model.set_attn_implementation("eager")
    fused = copy.deepcopy(model)
    fused.set_attn_implementation("fastlm")
    return model, fused


def llama(kind="Llama", **changes):
    config = getattr(transformers, f"{kind}Config")(
        **{**LLAMA, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes}
    )
    return lively(getattr(transformers, f"{kind}ForCausalLM")(config))


MODELS = {
    "GPT-2": lambda: tiny("GPT2", "LMHeadModel"),
    "BERT": lambda: tiny("Bert", "ForMaskedLM"),
    "BERT as decoder": lambda: tiny("Bert", "LMHeadModel", is_decoder=True),
    "grouped queries": llama,
    "sliding window": lambda: llama("Mistral", sliding_window=5),
    "sliding window of every other layer": lambda: llama(
        "Qwen2", sliding_window=4, use_sliding_window=True, max_window_layers=1
    ),
}
if not V5:  # BERT of transformers 4 does not use the attention interface
    del MODELS["BERT"], MODELS["BERT as decoder"]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_outputs_and_gradients(make):
    eager, fused = pair(make())
    x, mask = padded(13, 4, 9, tokens=13)
    for x, mask in ((x, None), (x, mask), (x.flip(1), mask.flip(1))):  # noqa: B020
        where = torch.ones_like(x).bool() if mask is None else mask.bool()
        for model in (eager, fused):
            model.zero_grad()
            model(x, attention_mask=mask).logits[where].square().mean().backward()
        torch.testing.assert_close(
            fused(x, attention_mask=mask).logits[where], eager(x, attention_mask=mask).logits[where], **CLOSE
        )
        for a, b in zip(fused.parameters(), eager.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(V5, reason="in transformers 5 every model uses the interface")
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_models_without_the_interface_raise(family):
    """A silent fallback would hide that the model does not use the attention that was asked for."""
    config = getattr(transformers, f"{family}Config")(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    with pytest.raises(ValueError, match=r"fastlm\.accelerate"):
        getattr(transformers, f"{family}Model")._from_config(config, attn_implementation="fastlm")


# Causality and every form of mask


CAUSAL = [name for name in MODELS if name != "BERT"]
FORMS = {
    "no mask": lambda x: {},
    "a mask without padding": lambda x: {"attention_mask": torch.ones_like(x)},
    "left padding": lambda x: {"attention_mask": (torch.arange(x.shape[1]) >= torch.tensor([[0], [3]])).long()},
    "right padding": lambda x: {"attention_mask": (torch.arange(x.shape[1]) < torch.tensor([[12], [10]])).long()},
    "a 4-D mask": lambda x: {
        "attention_mask": torch.full((x.shape[1],) * 2, torch.finfo(torch.float32).min)
        .triu(1)[None, None]
        .expand(2, 1, -1, -1)
    },
    "a 4-D bool mask": lambda x: {
        "attention_mask": torch.ones(x.shape[1], x.shape[1]).tril().bool()[None, None].expand(2, 1, -1, -1)
    },
    "packed sequences": lambda x: {
        "position_ids": torch.cat([torch.arange(5), torch.arange(x.shape[1] - 5)])[None].expand(2, -1),
        "use_cache": False,
    },
    "without a cache": lambda x: {"use_cache": False},
    "in training": lambda x: {"use_cache": False, "labels": x},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", CAUSAL)
def test_attention_is_causal(name, form):
    model = MODELS[name]()
    model.set_attn_implementation("fastlm")
    x = ids(2, 12)
    changed = x.clone()
    changed[:, 8:] = 5 + (x[:, 8:] - 4) % 126
    inputs = form(x)
    a, b = (model(y, **inputs).logits for y in (x, changed))
    seen = inputs.get("attention_mask")
    where = slice(None) if seen is None or seen.dim() == 4 else seen[:, :8].bool()
    assert torch.equal(a[:, :8][where], b[:, :8][where])
    assert not torch.allclose(a[:, 9], b[:, 9])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", CAUSAL)
def test_every_form_of_mask_matches_eager(name, form):
    eager, fused = pair(MODELS[name]())
    x = ids(2, 12)
    inputs = form(x)
    seen = inputs.get("attention_mask")
    eager_inputs = dict(inputs)
    if seen is not None and seen.dtype == torch.bool:  # eager adds the mask to the scores
        eager_inputs["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    where = torch.ones_like(x).bool() if seen is None or seen.dim() == 4 else seen.bool()
    actual, expected = fused(x, **inputs), eager(x, **eager_inputs)
    torch.testing.assert_close(actual.logits[where], expected.logits[where], **CLOSE)
    for model, output in ((fused, actual), (eager, expected)):
        output.logits[where].square().mean().backward()
        assert model.get_input_embeddings().weight.grad is not None
    torch.testing.assert_close(
        fused.get_input_embeddings().weight.grad, eager.get_input_embeddings().weight.grad, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("padding", [False, True, None])
@pytest.mark.parametrize("name", CAUSAL)
def test_chunked_prefill_and_decoding_match_one_pass(name, padding):
    """Prefill, several tokens after a cache, then one. The cache is dynamic or static. padding None: without a mask."""
    model = MODELS[name]()
    eager, fused = pair(model)
    x = ids(2, 12)
    mask = (torch.arange(12) >= torch.tensor([[0], [3]])).long() if padding else torch.ones_like(x)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    expected = eager(x, attention_mask=mask, position_ids=position).logits
    for static in (False, True):
        cache = (
            transformers.StaticCache(config=fused.config, max_cache_len=20)
            if static
            else transformers.DynamicCache(config=fused.config)
        )
        chunks = []
        for begin, end in ((0, 5), (5, 9), (9, 10), (10, 12)):
            chunk = {"position_ids": position[:, begin:end], "past_key_values": cache, "use_cache": True}
            chunk |= {} if padding is None else {"attention_mask": mask[:, :end]}
            chunks.append(fused(x[:, begin:end], **chunk).logits)
        torch.testing.assert_close(torch.cat(chunks, 1)[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("cache", [None, "static", "offloaded", "dynamic"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generate(name, cache):
    eager, fused = pair(MODELS[name]())
    x, mask = padded(9, 5, tokens=9)
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "disable_compile": True,
    }
    settings |= (
        {"cache_implementation": cache}
        if cache and not (cache == "offloaded" and not torch.cuda.is_available())
        else {}
    )
    inputs = {"input_ids": x.flip(1), "attention_mask": mask.flip(1)}
    for more in ({}, {"num_beams": 3}):
        assert torch.equal(fused.generate(**inputs, **settings, **more), eager.generate(**inputs, **settings, **more))


def test_chunked_attention():
    config = transformers.Llama4TextConfig(
        **{
            **LLAMA,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": 4,
            "interleave_moe_layer_step": 5,
            "pad_token_id": 0,
        }
    )
    eager, fused = pair(lively(transformers.Llama4ForCausalLM(config)))
    x, mask = padded(13, 9, tokens=13)
    for inputs in ({"input_ids": x}, {"input_ids": x, "attention_mask": mask}):
        where = torch.ones_like(x).bool() if len(inputs) == 1 else mask.bool()
        torch.testing.assert_close(fused(**inputs).logits[where], eager(**inputs).logits[where], **CLOSE)


# The form of masks


def make_mask(**settings):
    """The mask for 2 rows of 6 tokens, called as transformers calls it."""
    defaults = {
        "batch_size": 2,
        "q_length": 6,
        "kv_length": 6,
        "q_offset": 0,
        "kv_offset": 0,
        "mask_function": masking_utils.causal_mask_function,
    }
    return attention.mask(**version_arguments({**defaults, "attention_mask": None, **settings}))


def version_arguments(settings):
    """The arguments of this version of transformers. Version 4 passes the positions of the queries."""
    if V5:
        return settings
    begin, length = settings.pop("q_offset", 0), settings.pop("q_length")
    return {**settings, "cache_position": torch.arange(length) + begin}


def test_causal_and_padding_masks_are_none_or_2d():
    real = torch.ones(2, 6, dtype=torch.bool)
    hidden = real.clone()
    hidden[1, 4:] = False
    for padding in (None, real):
        assert make_mask(attention_mask=padding) is None
        assert make_mask(attention_mask=padding, allow_is_causal_skip=False, allow_is_bidirectional_skip=True) is None
    causal = make_mask(attention_mask=hidden)
    assert causal.shape == (2, 6) and causal.dtype == attention.CAUSAL and torch.equal(causal.bool(), hidden)
    both = make_mask(attention_mask=hidden, allow_is_causal_skip=False, allow_is_bidirectional_skip=True)
    assert both.dtype == torch.bool and torch.equal(both, hidden)
    after_cache = make_mask(kv_length=9, q_offset=3, attention_mask=torch.ones(2, 9, dtype=torch.bool))
    assert after_cache is None
    sliding_cache = make_mask(kv_length=4, q_length=1, q_offset=5, kv_offset=2, attention_mask=hidden)
    assert torch.equal(sliding_cache.bool(), hidden[:, 2:])
    assert make_mask(local_size=7) is None  # a window longer than the keys


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_length": 10},
        {"q_offset": torch.tensor(0)},
        {"kv_length": 10, "q_length": 1, "q_offset": 4},
        {"allow_is_causal_skip": False},
        {"local_size": 3, "mask_function": masking_utils.sliding_window_causal_mask_function(3)},
        {"mask_function": lambda b, h, q, kv: kv % 2 == 0},
    ],
)
def test_other_masks_are_4d(settings):
    """A static cache, sizes as tensors, a mask that is needed in full, a window, a custom mask function."""
    if not V5 and isinstance(settings.get("q_offset"), torch.Tensor):
        pytest.skip("transformers 4 passes positions in place of sizes")
    full_mask = make_mask(**settings)
    expected = masking_utils.sdpa_mask(
        **version_arguments({"batch_size": 2, "q_length": 6, "kv_length": 6, **settings, "allow_is_causal_skip": False})
    )
    assert full_mask.dtype == torch.bool and torch.equal(full_mask, expected)


def test_padding_of_finds_padding_masks_only():
    keys = torch.tensor([[True, True, False], [True, False, False]])
    lowest = torch.finfo(torch.float32).min
    additive = torch.where(keys, 0.0, lowest)[:, None, None]
    for mask in (
        keys,
        keys.long(),
        keys[:, None, None],
        additive,
        additive.expand(-1, 1, 3, -1),
        additive.expand(-1, 1, 3, -1).clone(),
    ):
        assert torch.equal(attention.padding_of(mask), keys)
    causal = torch.ones(3, 3).tril().bool()[None, None] & keys[:, None, None]
    for mask in (
        None,
        keys.to(attention.CAUSAL),
        causal,
        additive + torch.tensor([0.0, 0.5, 0.0]),
        keys[:, None, None].expand(-1, 2, -1, -1),
    ):
        assert attention.padding_of(mask) is None


# Other arguments


@pytest.mark.parametrize("mask", [None, "causal", "padding", "4-D"])
def test_attention_weights_match_eager(mask):
    module = torch.nn.Module()
    module.is_causal, module.training, module.num_key_value_groups = mask is None, False, 2
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    hidden = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    full = {
        None: torch.ones(6, 6).tril().bool(),
        "causal": torch.ones(6, 6).tril().bool() & hidden[:, None, None],
        "padding": hidden[:, None, None],
        "4-D": hidden[:, None, None],
    }
    given = {None: None, "causal": hidden.to(attention.CAUSAL), "padding": hidden, "4-D": hidden[:, None, None]}[mask]
    out, weights = attention.attention(module, query, key, value, given, output_attentions=True)
    plain, nothing = attention.attention(module, query, key, value, given)
    additive = torch.where(full[mask], 0.0, torch.finfo(torch.float32).min)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5 + additive
    torch.testing.assert_close(weights, scores.softmax(-1))
    torch.testing.assert_close(out, plain, **CLOSE)
    assert nothing is None


def test_position_bias_and_another_value_dim():
    module = torch.nn.Module()
    module.is_causal = True
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 5)
    bias = torch.randn(1, 4, 6, 6, requires_grad=True)
    out, _ = attention.attention(module, query, key, value, None, position_bias=bias, scaling=1.0)
    causal = torch.full((6, 6), -torch.inf).triu(1)
    expected = (query @ key.transpose(2, 3) + bias + causal).softmax(-1) @ value
    torch.testing.assert_close(out, expected.transpose(1, 2), **CLOSE)
    (gradient,) = torch.autograd.grad(out.square().sum(), bias, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), bias)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "value"), [("s_aux", torch.zeros(4)), ("cu_seq_lens_q", torch.tensor([0, 6]))])
def test_unsupported_arguments_raise(name, value):
    x = torch.randn(2, 4, 6, 8)
    with pytest.raises(fastlm.Unsupported, match=f"attn_implementation='fastlm': .*{name}"):
        attention.attention(torch.nn.Module(), x, x, x, None, **{name: value})
    with pytest.raises(ValueError, match=r"attention_mask: expected 2 or 4 dimensions, got \(2, 6, 6\)"):
        attention.attention(torch.nn.Module(), x, x, x, torch.ones(2, 6, 6))


@pytest.mark.slow
def test_compile_fullgraph():
    eager, fused = pair(llama())
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((13, 4), (7, 7, 2)):
        x, mask = padded(*lengths, tokens=lengths[0])
        torch.testing.assert_close(
            compiled(x, attention_mask=mask).logits[mask.bool()],
            eager(x, attention_mask=mask).logits[mask.bool()],
            **CLOSE,
        )
