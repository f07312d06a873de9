import pytest
import torch
import transformers
from torch.nn import functional as F

from fastlm.models import GPT2Config, GPT2LMHeadModel, GPT2Model
from tests.models.hugging_face import assert_within_twice_theirs, ours_like, tiny_gpt2

DTYPES = [torch.float32, torch.bfloat16]
VARIANTS = {
    "as published": {},
    "exact GELU": {"activation_function": "gelu"},
    "tanh GELU by its other name": {"activation_function": "gelu_pytorch_tanh"},
    "untied projection": {"tie_word_embeddings": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "not scaled": {"scale_attn_weights": False},
    "narrow MLP": {"n_inner": 50, "n_head": 1, "layer_norm_epsilon": 1e-3},
}


def tokens(*shape, vocab=131):
    return torch.randint(0, vocab, shape)


def plain():
    """Two rows; one label in five is ignored."""
    ids = tokens(2, 17)
    return {"input_ids": ids}, ids.masked_fill(torch.rand(2, 17) < 0.2, -100), ...


def left_padded():
    """Three rows of 17, 12 and 1 real tokens."""
    mask = torch.arange(17) >= torch.tensor([[0], [5], [16]])
    ids = tokens(3, 17)
    return {"input_ids": ids, "attention_mask": mask.long()}, ids.masked_fill(~mask, -100), mask


def left_padded_with_positions():
    inputs, labels, mask = left_padded()
    return inputs | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}, labels, mask


def right_padded():
    mask = torch.arange(17) < torch.tensor([[17], [5], [16]])
    ids = tokens(3, 17)
    return {"input_ids": ids, "attention_mask": mask}, ids.masked_fill(~mask, -100), mask


def types_and_positions():
    ids = tokens(2, 9)
    return (
        {"input_ids": ids, "token_type_ids": tokens(2, 9), "position_ids": torch.randperm(48)[:18].view(2, 9)},
        ids,
        ...,
    )


def embeddings():
    return {"inputs_embeds": torch.randn(2, 9, 36)}, tokens(2, 9), ...


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_loss_and_gradients(changes, dtype):
    assert_within_twice_theirs(lambda: tiny_gpt2(**changes), plain, dtype, shifted=True)


def test_float16():
    assert_within_twice_theirs(tiny_gpt2, plain, torch.float16, shifted=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "draw", [left_padded, left_padded_with_positions, right_padded, types_and_positions, embeddings]
)
def test_inputs(draw, dtype):
    assert_within_twice_theirs(tiny_gpt2, draw, dtype, shifted=True)


def test_position_ids_are_broadcast_over_the_batch():
    ours, ids, positions = ours_like(tiny_gpt2()), tokens(2, 9), torch.randperm(48)[None, :9]
    assert torch.equal(ours(ids, position_ids=positions).logits, ours(ids, position_ids=positions.expand(2, -1)).logits)


@pytest.mark.parametrize("length", [1, 48])
def test_one_token_and_the_full_context(length):
    theirs, ids = tiny_gpt2(), tokens(2, length)
    ours = ours_like(theirs)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    torch.testing.assert_close(ours(ids.int()).logits, ours(ids).logits, rtol=0, atol=0)


def test_single_blocks():
    theirs = tiny_gpt2()
    ours = ours_like(theirs)
    x = torch.randn(2, 11, 36)
    causal = torch.full((11, 11), -torch.inf).triu(1)[None, None]
    for own, block in zip(ours.transformer.h, theirs.transformer.h, strict=True):
        block_output, residual = own(x, None)
        torch.testing.assert_close(block_output + residual, block(x, attention_mask=causal), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gpt2_small():
    """124 million parameters, 40 tokens."""

    def draw():
        ids = tokens(1, 40, vocab=50257)
        return {"input_ids": ids}, ids, ...

    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    assert_within_twice_theirs(lambda: transformers.GPT2LMHeadModel(config).eval(), draw, shifted=True, draws=1)


def test_model_without_a_head():
    theirs = tiny_gpt2("GPT2Model")
    ours, ids = ours_like(theirs), tokens(2, 17)
    assert type(ours) is GPT2Model
    torch.testing.assert_close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours(ids)[0], ours(ids).last_hidden_state)


@pytest.mark.parametrize("head", ["GPT2Model", "GPT2LMHeadModel"])
def test_state_dict_keys_and_their_order(head):
    theirs = tiny_gpt2(head)
    assert list(ours_like(theirs).state_dict()) == list(theirs.state_dict())


def test_dropout_is_active_in_training_only():
    ids = tokens(2, 17)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        ours = ours_like(tiny_gpt2(**{name: 0.3}))
        assert torch.equal(ours(ids).logits, ours(ids).logits)
        ours.train()
        first, second = ours(ids).logits, ours(ids).logits
        assert not torch.equal(first, second)
        torch.manual_seed(5)
        third = ours(ids).logits
        torch.manual_seed(5)
        assert torch.equal(third, ours(ids).logits)


@pytest.mark.parametrize("name", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_dropout_statistics_equal_hugging_faces(name):
    """Mean and standard deviation over many dropout masks equal those of Hugging Face's model."""
    theirs = tiny_gpt2("GPT2Model", n_layer=2, **{name: 0.5}).train()
    ours, ids = ours_like(theirs).train(), tokens(1, 6)
    with torch.no_grad():
        batch = ids.expand(3000, -1)  # every row has its own masks
        own, other = ours(batch).last_hidden_state, theirs(batch).last_hidden_state
    spread = other.std(0)
    assert spread.min() > 0.01
    torch.testing.assert_close(own.std(0), spread, rtol=0.15, atol=0.0)
    five_standard_errors = 5 * (2 / 3000) ** 0.5  # of the difference
    assert ((own.mean(0) - other.mean(0)) / spread).abs().max() < five_standard_errors


def test_training_mode_returns_the_loss_only():
    ours, ids = ours_like(tiny_gpt2()), tokens(2, 17)
    both = ours(ids, labels=ids)
    assert both.keys() == ("loss", "logits")
    torch.testing.assert_close(both.loss, F.cross_entropy(both.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    ours.train()
    alone = ours(ids, labels=ids)
    assert alone.keys() == ("loss",) and alone.logits is None
    torch.testing.assert_close(alone.loss, both.loss)
    assert ours(ids).logits is not None


def test_logits_to_keep():
    ours, ids = ours_like(tiny_gpt2()), tokens(2, 17)
    full = ours(ids, labels=ids)
    kept = ours(ids, labels=ids, logits_to_keep=2)
    torch.testing.assert_close(kept.logits, full.logits[:, -2:])
    assert torch.equal(kept.loss, full.loss)
    assert ours(ids, logits_to_keep=1).logits.shape == (2, 1, 131)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(17,), (1,) * 17, (8, 5, 4)], ids=str)
def test_cached_forward_equals_a_single_pass(chunks):
    ours, ids = ours_like(tiny_gpt2()), tokens(2, 17)
    cache, parts = None, []
    for part in ids.split(chunks, dim=1):
        output = ours(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert cache.length == 17
    torch.testing.assert_close(torch.cat(parts, 1), ours(ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cache_with_padding():
    inputs, _, where = left_padded()
    ours = ours_like(tiny_gpt2())
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first = ours(ids[:, :10], attention_mask=mask[:, :10], use_cache=True)
    rest = ours(ids[:, 10:], attention_mask=mask, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest[where[:, 10:]], ours(**inputs).logits[:, 10:][where[:, 10:]], rtol=1e-4, atol=1e-5)


def test_initialisation_equals_hugging_faces():
    torch.manual_seed(3)
    config = {"n_layer": 4, "n_embd": 96, "n_head": 2, "vocab_size": 800, "n_positions": 300, "initializer_range": 0.03}
    ours = GPT2LMHeadModel(GPT2Config(**config, tie_word_embeddings=False))
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, tie_word_embeddings=False))
    for (name, own), (other_name, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other_name
        if other.std() == 0:
            assert torch.equal(own, other), name  # biases and LayerNorm parameters
        else:
            # 4.5 standard errors: σ/√(2n) for an estimated standard deviation, σ/√n for a mean
            assert abs(own.std() / other.std() - 1) < 4.5 / own.numel() ** 0.5, name
            assert abs(own.mean()) < 4.5 * other.std() / own.numel() ** 0.5, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype):
    theirs, ids = tiny_gpt2(), tokens(2, 17)
    ours = ours_like(theirs)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        mine, other = ours(ids, labels=ids), theirs(ids, labels=ids)
    truth = theirs.double()(ids).logits
    assert mine.logits.dtype == other.logits.dtype
    assert (mine.logits - truth).norm() <= 2 * (other.logits - truth).norm()
    mine.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(tokens(2, 5) + 131), r"input_ids: expected values in \[0, 131\), got \d+"),
        (lambda m: m(tokens(2, 5) - 131), r"input_ids: expected values in \[0, 131\), got -\d+"),
        (lambda m: m(tokens(2, 5).float()), r"input_ids: expected dtype torch.int64 or torch.int32, got torch.float32"),
        (lambda m: m(tokens(5)), r"input_ids: expected shape \(batch, tokens\), got \(5,\)"),
        (lambda m: m(tokens(2, 0)), r"input_ids: expected at least one token, got \(2, 0\)"),
        (lambda m: m(tokens(2, 49)), r"input_ids: expected at most 48 tokens, the context of the model, got 49"),
        (lambda m: m(tokens(2, 5).to("meta")), r"input_ids: expected a tensor on cpu, as the model, got meta"),
        (lambda m: m(), r"input_ids: expected either input_ids or inputs_embeds, got neither"),
        (
            lambda m: m(tokens(2, 5), inputs_embeds=torch.randn(2, 5, 36)),
            r"input_ids: expected either input_ids or inputs_embeds, got both",
        ),
        (
            lambda m: m(inputs_embeds=torch.randn(2, 5, 35)),
            r"inputs_embeds: expected shape \(batch, tokens, 36\), got \(2, 5, 35\)",
        ),
        (
            lambda m: m(inputs_embeds=tokens(2, 5, 36)),
            r"inputs_embeds: expected a floating-point tensor, got torch.int64",
        ),
        (
            lambda m: m(tokens(2, 5), attention_mask=torch.ones(2, 4)),
            r"attention_mask: expected shape \(2, 5\): one value per token.*, got \(2, 4\)",
        ),
        (
            lambda m: m(tokens(2, 5), position_ids=torch.full((2, 5), 48)),
            r"position_ids: expected values in \[0, 48\), got 48",
        ),
        (
            lambda m: m(tokens(2, 5), position_ids=torch.zeros(5).long()),
            r"position_ids: expected shape \(2, 5\), as input_ids or inputs_embeds, got \(5,\)",
        ),
        (
            lambda m: m(tokens(2, 5), token_type_ids=torch.full((2, 5), 131)),
            r"token_type_ids: expected values in \[0, 131\), got 131",
        ),
        (
            lambda m: m(tokens(2, 5), labels=torch.full((2, 5), 131)),
            r"labels: expected values in \[0, 131\) or -100, got 131",
        ),
        (
            lambda m: m.train()(tokens(2, 5), labels=torch.full((2, 5), -1)),
            r"labels: expected values in \[0, 131\) or -100, got -1",
        ),
        (
            lambda m: m(tokens(2, 5), labels=tokens(1, 5)),
            r"labels: expected shape \(2, 5\), as input_ids or inputs_embeds, got \(1, 5\)",
        ),
        (
            lambda m: m(tokens(2, 5), labels=torch.ones(2, 5)),
            r"labels: expected dtype torch.int64 or torch.int32, got torch.float32",
        ),
        (
            lambda m: m(tokens(2, 5), past_key_values=cache_of(m, 2, 44)),
            r"input_ids: expected at most 48 tokens.*, got 5 after 44 in the cache",
        ),
        (
            lambda m: m.requires_grad_(False)(tokens(3, 4), past_key_values=cache_of(m, 2, 44)),
            r"past_key_values: expected a cache of 3 sequences, as the input, got 2",
        ),
        (
            lambda m: m(tokens(2, 1), past_key_values=cache_of(m, 2, 4)),
            r"past_key_values: expected a call under torch.no_grad\(\)",
        ),
    ],
)
def test_errors(call, message):
    ours = ours_like(tiny_gpt2())
    with pytest.raises(ValueError, match=message) as error:
        call(ours)
    assert "\n" not in str(error.value)


def cache_of(model, batch, length):
    with torch.no_grad():
        return model(tokens(batch, length), use_cache=True).past_key_values


def test_cache_with_gradient_checkpointing_is_an_error():
    ours = ours_like(tiny_gpt2()).train()
    ours.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="past_key_values: expected None with gradient checkpointing, got a cache"):
        ours(tokens(2, 5), use_cache=True)


def test_empty_batch():
    assert ours_like(tiny_gpt2())(tokens(0, 5)).logits.shape == (0, 5, 131)
