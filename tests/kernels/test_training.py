"""A training step of each model on the GPU kernels, compared with the reference."""

import pytest
import torch

import fastlm
from fastlm.models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from tests.support import error, on_backends, targets

RATE = 1e-3  # learning rate


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=24, n_embd=24, n_layer=2, n_head=2))


def bert():
    return BertForMaskedLM(
        BertConfig(
            vocab_size=61,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=24,
        )
    )


@pytest.mark.unsampled
@on_backends("triton", "cuda")
@pytest.mark.parametrize("model", [gpt2, bert])
def test_a_training_step(model, backend):
    """With dropout, padding and AdamW: the loss before and after the step, all gradients and new weights."""
    torch.manual_seed(0)
    start = model().state_dict()
    tokens, labels = targets(61, 2, 18), targets(61, 2, 18, ignored=[3])
    padding = torch.ones(2, 18, dtype=torch.int64)
    padding[1, 14:] = 0
    outcomes = []
    for name in ("reference", backend):
        with fastlm.use_backend(name):
            trained = model().train()
            trained.load_state_dict(start)
            optimizer = torch.optim.AdamW(trained.parameters(), lr=RATE)
            torch.manual_seed(2)
            loss = trained(tokens, attention_mask=padding, labels=labels).loss
            loss.backward()
            gradients = {key: parameter.grad.clone() for key, parameter in trained.named_parameters()}
            optimizer.step()
            with torch.no_grad():
                after = trained.eval()(tokens, attention_mask=padding, labels=labels).loss
            outcomes.append((loss.detach(), after, gradients, dict(trained.named_parameters())))
    (loss, after, gradients, weights), (own_loss, own_after, own_gradients, own_weights) = outcomes
    torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own_after, after, rtol=1e-4, atol=1e-4)
    compared = 0
    for key, expected in gradients.items():
        largest = max(expected.abs().max().item(), 1e-3)  # the gradient of a key's bias is 0 up to rounding
        assert (own_gradients[key] - expected).abs().max().item() <= 1e-5 * largest + 1e-6, key
        # AdamW's first step depends on the sign of the gradient only. Signs that rounding may change are not compared.
        certain = expected.abs() > 1e-4 * largest + 1e-5
        assert (weights[key] != start[key])[certain].all(), key
        assert ((own_weights[key] - weights[key]).abs() <= 1e-2 * RATE)[certain].all(), key
        compared += certain.sum().item()
    assert compared > 0.5 * sum(p.numel() for p in weights.values())
    assert error(own_loss, loss.double()) < 1e-5
