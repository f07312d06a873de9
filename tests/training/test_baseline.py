"""The baselines compute the same function as fastlm's models."""

import pytest
import torch

from fastlm.models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from fastlm.training.baseline import PlainGPT2
from fastlm.training.baseline_bert import PlainBert

# float32 sums of up to 256 terms in another order, over four layers: differences of tens of units in the last place.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def pair():
    config = GPT2Config(
        vocab_size=61, n_positions=40, n_embd=64, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        # Biases and norms too: with their initial values, errors in their use would not be detected.
        for parameter in model.parameters():
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
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, **CLOSE, msg=lambda message, name=name: f"{name}: {message}"
        )


def test_same_generated_tokens(pair, tokens):
    model, plain = pair
    prompt = tokens[:, :5]
    assert torch.equal(plain.generate(prompt, 20), model.generate(prompt, max_new_tokens=20, eos_token_id=()))


def test_bert_has_the_same_keys_loss_and_gradients(tokens):
    config = BertConfig(
        vocab_size=61,
        max_position_embeddings=40,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    plain = PlainBert.like(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    targets = tokens.masked_fill(torch.rand(tokens.shape) > 0.3, -100)
    ours, theirs = model.train()(input_ids=tokens, labels=targets).loss, plain.train().loss(plain, tokens, targets)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    ours.backward(), theirs.backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], **CLOSE, msg=lambda message, name=name: f"{name}: {message}"
        )
