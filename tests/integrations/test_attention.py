"""attn_implementation="fastlm": every way in which transformers asks for a mask, for its own models and for others."""

import copy

import pytest
import torch
import transformers
from transformers import masking_utils

import fastlm
import fastlm.integrations.transformers  # registers the name
from fastlm.integrations import attention
from tests.integrations.accelerated import V5, ids, padded, tiny
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
    """The model with transformers' "eager", and a copy with ours."""
    model.set_attn_implementation("eager")
    ours = copy.deepcopy(model)
    ours.set_attn_implementation("fastlm")
    return model, ours


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
if not V5:  # whose BERTs do not compute attention through the interface
    del MODELS["BERT"], MODELS["BERT as decoder"]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_numbers_and_gradients(make):
    eager, ours = pair(make())
    x, mask = padded(13, 4, 9, tokens=13)
    for x, mask in ((x, None), (x, mask), (x.flip(1), mask.flip(1))):  # noqa: B020
        where = torch.ones_like(x).bool() if mask is None else mask.bool()
        for model in (eager, ours):
            model.zero_grad()
            model(x, attention_mask=mask).logits[where].square().mean().backward()
        torch.testing.assert_close(
            ours(x, attention_mask=mask).logits[where], eager(x, attention_mask=mask).logits[where], **CLOSE
        )
        for a, b in zip(ours.parameters(), eager.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(V5, reason="transformers 5 has every model on its interface")
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_models_that_are_not_on_the_interface_say_so(family):
    """And not less than with an error: a model that is asked for this attention and has another would be worse."""
    config = getattr(transformers, f"{family}Config")(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    with pytest.raises(ValueError, match=r"fastlm\.accelerate"):
        getattr(transformers, f"{family}Model")._from_config(config, attn_implementation="fastlm")


# The causal mask is never lost


CAUSAL = [name for name in MODELS if name != "BERT"]
WAYS = {
    "no mask": lambda x: {},
    "a mask that hides nothing": lambda x: {"attention_mask": torch.ones_like(x)},
    "padding in front": lambda x: {"attention_mask": (torch.arange(x.shape[1]) >= torch.tensor([[0], [3]])).long()},
    "padding behind": lambda x: {"attention_mask": (torch.arange(x.shape[1]) < torch.tensor([[12], [10]])).long()},
    "a 4-D mask": lambda x: {
        "attention_mask": torch.full((x.shape[1],) * 2, torch.finfo(torch.float32).min)
        .triu(1)[None, None]
        .expand(2, 1, -1, -1)
    },
    "a 4-D mask of bools": lambda x: {
        "attention_mask": torch.ones(x.shape[1], x.shape[1]).tril().bool()[None, None].expand(2, 1, -1, -1)
    },
    "packed sequences": lambda x: {
        "position_ids": torch.cat([torch.arange(5), torch.arange(x.shape[1] - 5)])[None].expand(2, -1),
        "use_cache": False,
    },
    "without a cache": lambda x: {"use_cache": False},
    "in training": lambda x: {"use_cache": False, "labels": x},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", CAUSAL)
def test_no_token_sees_a_later_one(name, way):
    model = MODELS[name]()
    model.set_attn_implementation("fastlm")
    x = ids(2, 12)
    changed = x.clone()
    changed[:, 8:] = 5 + (x[:, 8:] - 4) % 126
    inputs = way(x)
    a, b = (model(y, **inputs).logits for y in (x, changed))
    seen = inputs.get("attention_mask")
    where = slice(None) if seen is None or seen.dim() == 4 else seen[:, :8].bool()
    assert torch.equal(a[:, :8][where], b[:, :8][where])
    assert not torch.allclose(a[:, 9], b[:, 9])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", CAUSAL)
def test_every_form_of_mask_has_the_numbers_of_eager(name, way):
    eager, ours = pair(MODELS[name]())
    x = ids(2, 12)
    inputs = way(x)
    seen = inputs.get("attention_mask")
    theirs = dict(inputs)
    if seen is not None and seen.dtype == torch.bool:  # eager adds what it is given
        theirs["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    where = torch.ones_like(x).bool() if seen is None or seen.dim() == 4 else seen.bool()
    own, other = ours(x, **inputs), eager(x, **theirs)
    torch.testing.assert_close(own.logits[where], other.logits[where], **CLOSE)
    for model, output in ((ours, own), (eager, other)):
        output.logits[where].square().mean().backward()
        assert model.get_input_embeddings().weight.grad is not None
    torch.testing.assert_close(
        ours.get_input_embeddings().weight.grad, eager.get_input_embeddings().weight.grad, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("padding", [False, True, None])
@pytest.mark.parametrize("name", CAUSAL)
def test_in_pieces_as_at_once(name, padding):
    """Prefill, several tokens behind a cache, then one at a time; the cache dynamic and static; with a mask, with none (None)."""
    model = MODELS[name]()
    eager, ours = pair(model)
    x = ids(2, 12)
    mask = (torch.arange(12) >= torch.tensor([[0], [3]])).long() if padding else torch.ones_like(x)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    whole = eager(x, attention_mask=mask, position_ids=position).logits
    for static in (False, True):
        cache = (
            transformers.StaticCache(config=ours.config, max_cache_len=20)
            if static
            else transformers.DynamicCache(config=ours.config)
        )
        pieces = []
        for begin, end in ((0, 5), (5, 9), (9, 10), (10, 12)):
            piece = {"position_ids": position[:, begin:end], "past_key_values": cache, "use_cache": True}
            piece |= {} if padding is None else {"attention_mask": mask[:, :end]}
            pieces.append(ours(x[:, begin:end], **piece).logits)
        torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], **CLOSE)


@pytest.mark.parametrize("cache", [None, "static", "offloaded", "dynamic"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generate(name, cache):
    eager, ours = pair(MODELS[name]())
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
        assert torch.equal(ours.generate(**inputs, **settings, **more), eager.generate(**inputs, **settings, **more))


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
    eager, ours = pair(lively(transformers.Llama4ForCausalLM(config)))
    x, mask = padded(13, 9, tokens=13)
    for inputs in ({"input_ids": x}, {"input_ids": x, "attention_mask": mask}):
        where = torch.ones_like(x).bool() if len(inputs) == 1 else mask.bool()
        torch.testing.assert_close(ours(**inputs).logits[where], eager(**inputs).logits[where], **CLOSE)


# Masks stay small


def asked(**settings):
    """As transformers asks: for 2 rows of 6 tokens."""
    known = {
        "batch_size": 2,
        "q_length": 6,
        "kv_length": 6,
        "q_offset": 0,
        "kv_offset": 0,
        "mask_function": masking_utils.causal_mask_function,
    }
    return attention.mask(**spelled({**known, "attention_mask": None, **settings}))


def spelled(settings):
    """As this version of transformers does: in 4 the positions of the queries say how many there are, and where."""
    if V5:
        return settings
    begin, length = settings.pop("q_offset", 0), settings.pop("q_length")
    return {**settings, "cache_position": torch.arange(length) + begin}


def test_plain_masks_are_none_or_2d():
    real = torch.ones(2, 6, dtype=torch.bool)
    hidden = real.clone()
    hidden[1, 4:] = False
    for padding in (None, real):
        assert asked(attention_mask=padding) is None
        assert asked(attention_mask=padding, allow_is_causal_skip=False, allow_is_bidirectional_skip=True) is None
    causal = asked(attention_mask=hidden)
    assert causal.shape == (2, 6) and causal.dtype == attention.CAUSAL and torch.equal(causal.bool(), hidden)
    both = asked(attention_mask=hidden, allow_is_causal_skip=False, allow_is_bidirectional_skip=True)
    assert both.dtype == torch.bool and torch.equal(both, hidden)
    assert asked(kv_length=9, q_offset=3, attention_mask=torch.ones(2, 9, dtype=torch.bool)) is None  # behind a cache
    assert torch.equal(
        asked(kv_length=4, q_length=1, q_offset=5, kv_offset=2, attention_mask=hidden).bool(), hidden[:, 2:]
    )  # of a sliding cache
    assert asked(local_size=7) is None  # a window that hides nothing


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
def test_anything_else_is_whole(settings):
    """A static cache, tensors for sizes, a mask someone needs in full, a window, a mask of one's own."""
    if not V5 and isinstance(settings.get("q_offset"), torch.Tensor):
        pytest.skip("transformers 4 gives positions, not sizes")
    whole = asked(**settings)
    wanted = masking_utils.sdpa_mask(
        **spelled({"batch_size": 2, "q_length": 6, "kv_length": 6, **settings, "allow_is_causal_skip": False})
    )
    assert whole.dtype == torch.bool and torch.equal(whole, wanted)


def test_what_is_padding_and_nothing_else():
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


# What a caller may ask besides


@pytest.mark.parametrize("mask", [None, "causal", "padding", "4-D"])
def test_attention_weights_are_those_of_eager(mask):
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


def test_a_bias_of_positions_and_values_of_another_width():
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


@pytest.mark.parametrize(
    ("name", "value"), [("softcap", 30.0), ("s_aux", torch.zeros(4)), ("cu_seq_lens_q", torch.tensor([0, 6]))]
)
def test_what_it_cannot_do_is_refused_with_the_reason(name, value):
    x = torch.randn(2, 4, 6, 8)
    with pytest.raises(fastlm.Unsupported, match=f"attn_implementation='fastlm': .*{name}"):
        attention.attention(torch.nn.Module(), x, x, x, None, **{name: value})
    with pytest.raises(ValueError, match=r"attention_mask: expected 2 or 4 dimensions, got \(2, 6, 6\)"):
        attention.attention(torch.nn.Module(), x, x, x, torch.ones(2, 6, 6))


@pytest.mark.slow
def test_compiled_whole():
    eager, ours = pair(llama())
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((13, 4), (7, 7, 2)):
        x, mask = padded(*lengths, tokens=lengths[0])
        torch.testing.assert_close(
            compiled(x, attention_mask=mask).logits[mask.bool()],
            eager(x, attention_mask=mask).logits[mask.bool()],
            **CLOSE,
        )
