"""The rival must be the same model, or every comparison with it is void."""

import pytest
import torch

from fastlm.models import GPT2Config, GPT2LMHeadModel
from fastlm.training.baseline import PlainGPT2

# float32: the same sums in another order. Four layers of sums of up to 256 terms differ by tens of units in the last place.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def pair():
    config = GPT2Config(vocab_size=61, n_positions=40, n_embd=64, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: at their initial values a mistake in them would not show
            parameter += 0.1 * torch.randn_like(parameter)
    return model, PlainGPT2.like(model)


@pytest.fixture
def tokens():
    return torch.randint(61, (2, 40))


def test_same_keys_and_values(pair):
    model, plain = pair
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].data_ptr() != theirs[key].data_ptr() for key in ours)
    assert plain.lm_head.weight is plain.transformer.wte.weight


def test_same_loss_logits_and_gradients(pair, tokens):
    model, plain = pair
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    output = plain(inputs, targets)
    ours = model.eval()(input_ids=inputs)
    torch.testing.assert_close(ours.logits, output.logits, **CLOSE)
    torch.nn.functional.cross_entropy(ours.logits.flatten(0, 1), targets.flatten()).backward()
    output.loss.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, **CLOSE, msg=lambda message, name=name: f"{name}: {message}")


def test_same_text(pair, tokens):
    model, plain = pair
    prompt = tokens[:, :5]
    assert torch.equal(plain.generate(prompt, 20), model.generate(prompt, max_new_tokens=20, eos_token_id=()))
