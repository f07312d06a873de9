import threading

import numpy
import pytest
import torch
import transformers

from fastlm.core.modules import evaluation_mode
from fastlm.generation import generate
from tests.models.hugging_face import ours_like, tiny_gpt2


def prompts(*shape):
    return torch.randint(0, 131, shape)


def left_padded():
    mask = (torch.arange(7) >= torch.tensor([[0], [3], [6]])).long()
    return prompts(3, 7).masked_fill(mask == 0, 130), mask


def theirs_generates(theirs, ids, new, **settings):
    return theirs.generate(ids, max_new_tokens=new, do_sample=False, **{"pad_token_id": 130, **settings})


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (4, 5)])
@pytest.mark.parametrize(
    "changes",
    [{}, {"scale_attn_by_inverse_layer_idx": True}, {"tie_word_embeddings": False, "activation_function": "gelu"}],
    ids=str,
)
def test_greedy_token_for_token(shape, changes):
    theirs, ids = tiny_gpt2(**changes), prompts(*shape)
    expected = theirs_generates(theirs, ids, 30, attention_mask=torch.ones_like(ids))
    assert torch.equal(ours_like(theirs).generate(ids, max_new_tokens=30), expected)


def test_greedy_left_padded_token_for_token():
    theirs, (ids, mask) = tiny_gpt2(), left_padded()
    expected = theirs_generates(theirs, ids, 30, attention_mask=mask)
    ours = ours_like(theirs)
    together = ours.generate(ids, max_new_tokens=30, attention_mask=mask)
    assert torch.equal(together, expected)
    for row, real in enumerate(mask.sum(1)):  # as for each row alone
        alone = ours.generate(ids[row : row + 1, 7 - real :], max_new_tokens=30)
        assert torch.equal(together[row, 7 - real :], alone[0])


def test_greedy_with_gpt2_head_size_up_to_the_full_context():
    """12 heads of 64 and the full vocabulary; generation fills the context."""
    torch.manual_seed(4)
    config = transformers.GPT2Config(n_layer=2, n_positions=40, bos_token_id=None, eos_token_id=None)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(4)
    ids = torch.randint(0, 50257, (2, 12))
    expected = theirs_generates(theirs, ids, 28, attention_mask=torch.ones_like(ids))
    assert torch.equal(ours_like(theirs).generate(ids, max_new_tokens=28), expected)
    assert expected[0].unique().numel() > 15  # not one repeated token


def by_windows(model, ids, new):
    """Greedy decoding by definition: every token from the last 48 tokens, the context, and no cache."""
    for _ in range(new):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids[:, -48:]).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("prompt, new", [(40, 40), (48, 5), (60, 12), (1, 70)])
def test_the_window_slides_beyond_the_context(prompt, new):
    theirs, ids = tiny_gpt2(), prompts(2, prompt)
    assert torch.equal(ours_like(theirs).generate(ids, max_new_tokens=new), by_windows(theirs, ids, new))


def test_left_padding_slides_out_of_the_window():
    ours, (ids, mask) = ours_like(tiny_gpt2()), left_padded()
    together = ours.generate(ids, max_new_tokens=60, attention_mask=mask)
    for row, real in enumerate(mask.sum(1)):
        alone = ours.generate(ids[row : row + 1, 7 - real :], max_new_tokens=60)
        # The window of 48 tokens counts padding, so that rows agree until it slides, and again from when it is full.
        assert torch.equal(together[row, 7 - real :][: 48 - (7 - real)], alone[0][: 48 - (7 - real)])
    assert together.shape == (3, 67)


@pytest.mark.parametrize("several", [False, True])
def test_finished_rows_are_padded(several):
    theirs, ids = tiny_gpt2(), prompts(4, 5)
    ours = ours_like(theirs)
    free = ours.generate(ids, max_new_tokens=20)
    eos = [free[0, 8].item(), free[1, 12].item()] if several else free[0, 8].item()
    expected = theirs_generates(theirs, ids, 20, attention_mask=torch.ones_like(ids), eos_token_id=eos)
    assert (expected == 130).any()
    assert torch.equal(ours.generate(ids, max_new_tokens=20, eos_token_id=eos, pad_token_id=130), expected)
    default = ours.generate(ids, max_new_tokens=20, eos_token_id=eos)
    assert torch.equal(default, torch.where(expected == 130, free.new_tensor(eos if not several else eos[0]), expected))


def test_generation_stops_when_all_rows_have_finished():
    ours, ids = ours_like(tiny_gpt2()), prompts(1, 5)
    free = ours.generate(ids, max_new_tokens=20)
    stop = free[0, 9].item()
    first = (free[0, 5:] == stop).nonzero()[0, 0] + 5
    assert torch.equal(ours.generate(ids, max_new_tokens=20, eos_token_id=stop), free[:, : first + 1])
    ours.config.eos_token_id = stop  # the config sets the default
    assert torch.equal(ours.generate(ids, max_new_tokens=20), free[:, : first + 1])
    assert torch.equal(ours.generate(ids, max_new_tokens=20, eos_token_id=()), free)


def test_seed_is_reproducible_and_leaves_the_default_generator_unchanged():
    ours, ids = ours_like(tiny_gpt2()), prompts(3, 5)
    state = torch.random.get_rng_state()
    first = ours.generate(ids, max_new_tokens=20, temperature=1.0, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, ours.generate(ids, max_new_tokens=20, temperature=1.0, seed=7))
    assert torch.equal(first, ours.generate(ids, max_new_tokens=20, temperature=1.0, seed=numpy.int64(7)))
    assert not torch.equal(first, ours.generate(ids, max_new_tokens=20, temperature=1.0, seed=8))
    free = ours.generate(ids, max_new_tokens=20, temperature=1.0)
    assert not torch.equal(free, ours.generate(ids, max_new_tokens=20, temperature=1.0))
    torch.random.set_rng_state(state)
    assert torch.equal(free, ours.generate(ids, max_new_tokens=20, temperature=1.0))


def test_samples_follow_the_model_distribution():
    """Frequencies of the first new token over many rows match the softmax of the logits."""
    ours, ids = ours_like(tiny_gpt2()), prompts(1, 5)
    rows = 20_000
    drawn = ours.generate(ids.expand(rows, -1), max_new_tokens=1, temperature=0.7, top_k=6, seed=1)[:, -1]
    with torch.no_grad():
        scores, tokens = ours(ids).logits[0, -1].topk(6)
    expected = (scores / 0.7).softmax(-1)
    found = torch.bincount(drawn, minlength=131)
    assert found.sum() == found[tokens].sum() == rows
    assert (
        (found[tokens] / rows - expected).abs() <= 5 * (expected * (1 - expected) / rows).sqrt()
    ).all()  # five standard errors


class Recorder:
    def __init__(self):
        self.seen, self.ended = [], 0

    def put(self, value):
        self.seen.append(value)

    def end(self):
        self.ended += 1


def test_streamer_receives_the_prompt_and_every_step():
    ours, ids, recorder = ours_like(tiny_gpt2()), prompts(2, 5), Recorder()
    full = ours.generate(ids, max_new_tokens=6, streamer=recorder)
    assert torch.equal(recorder.seen[0], ids) and [tuple(v.shape) for v in recorder.seen[1:]] == [(2,)] * 6
    assert (
        torch.equal(torch.cat([recorder.seen[0], torch.stack(recorder.seen[1:], 1)], 1), full) and recorder.ended == 1
    )


def test_hugging_face_streamer():
    class Words:
        def decode(self, ids, **_):
            return "".join(f"{int(i)} " for i in ids)

    ours, ids = ours_like(tiny_gpt2()), prompts(1, 5)
    streamer = transformers.TextIteratorStreamer(Words(), skip_prompt=True)
    thread = threading.Thread(target=ours.generate, args=(ids, 6), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == [str(i) for i in ours.generate(ids, max_new_tokens=6)[0, 5:].tolist()]


def test_dropout_is_disabled_and_the_mode_is_restored():
    ours, ids = ours_like(tiny_gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)), prompts(2, 5)
    expected = ours.generate(ids, max_new_tokens=9)
    ours.train()
    ours.transformer.h[1].eval()  # a partly frozen model
    modes = [module.training for module in ours.modules()]
    assert torch.equal(ours.generate(ids, max_new_tokens=9), expected)
    assert [module.training for module in ours.modules()] == modes
    with pytest.raises(ZeroDivisionError), evaluation_mode(ours):
        assert not any(module.training for module in ours.modules())
        raise ZeroDivisionError
    assert [module.training for module in ours.modules()] == modes


def test_generated_tokens_can_be_trained_on():
    ours = ours_like(tiny_gpt2())
    ids = ours.generate(prompts(2, 5), max_new_tokens=9)
    assert not ids.is_inference()
    ours.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_prompt_dtypes_and_defaults():
    ours, ids = ours_like(tiny_gpt2()), prompts(2, 5)
    expected = ours.generate(ids, max_new_tokens=6)
    assert torch.equal(ours.generate(ids.int(), max_new_tokens=6), expected)
    assert torch.equal(ours.generate(ids, max_new_tokens=6, attention_mask=torch.ones_like(ids)), expected)
    assert torch.equal(generate(ours, ids, 6), expected)
    assert ours.generate(ids).shape == (2, 25)
    assert ours.to(torch.bfloat16).generate(ids, max_new_tokens=6).shape == (2, 11)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.generate(prompts(1, 5), max_new_tokens=0), "max_new_tokens: expected an integer >= 1, got 0"),
        (lambda m: m.generate(prompts(1, 5), max_new_tokens=2.5), "max_new_tokens: expected an integer >= 1, got 2.5"),
        (lambda m: m.generate(prompts(1, 5), seed=2**64), r"seed: expected an integer in \[-2\^63, 2\^64\), got"),
        (lambda m: m.generate(prompts(1, 5), seed="1"), r"seed: expected an integer in \[-2\^63, 2\^64\), got '1'"),
        (
            lambda m: m.generate(prompts(1, 0)),
            r"input_ids: expected shape \(batch, tokens\) with at least one of each, got \(1, 0\)",
        ),
        (
            lambda m: m.generate(prompts(5)),
            r"input_ids: expected shape \(batch, tokens\) with at least one of each, got \(5,\)",
        ),
        (lambda m: m.generate(prompts(1, 5) + 131), r"input_ids: expected values in \[0, 131\), got"),
        (
            lambda m: m.generate(prompts(1, 5).float()),
            r"input_ids: expected dtype torch.int64 or torch.int32, got torch.float32",
        ),
        (lambda m: m.generate(prompts(1, 5), temperature=-1), "temperature: expected a finite number >= 0, got -1"),
        (lambda m: m.generate(prompts(1, 5), top_k=0), "top_k: expected an integer >= 1, got 0"),
        (lambda m: m.generate(prompts(1, 5), top_p=0), r"top_p: expected a probability in \(0, 1\], got 0"),
        (
            lambda m: m.generate(prompts(1, 5), attention_mask=torch.ones(1, 4)),
            r"attention_mask: expected shape \(1, 5\), as input_ids, got \(1, 4\)",
        ),
        (
            lambda m: m.generate(prompts(1, 2), attention_mask=torch.tensor([[1, 0]])),
            "attention_mask: expected padding on the left only",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(ours_like(tiny_gpt2()))
