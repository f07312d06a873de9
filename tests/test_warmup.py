import pytest
import torch

import fastlm
from fastlm.models import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel


@pytest.mark.parametrize("training", [True, False])
def test_warmup_changes_no_state(training):
    models = (
        GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=1, n_head=2)),
        BertModel(
            BertConfig(
                vocab_size=31,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=16,
            )
        ),
    )
    for model in models:
        model.train(training)
        before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
        seen = []
        model.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(tuple(inputs[0].shape)))
        fastlm.warmup(model, [(2, 8), (1, 16)])
        assert seen == [(2, 8), (1, 16)] and model.training == training
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state) and all(
            parameter.grad is None for parameter in model.parameters()
        )


def test_warmup_runs_backward_in_training_mode():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=1, n_head=2)).train()
    ran = []
    model.transformer.wte.weight.register_hook(ran.append)
    fastlm.warmup(model, [(1, 4)])
    assert ran
    with torch.no_grad():
        fastlm.warmup(model, [(1, 4)])
    assert len(ran) == 1


@pytest.mark.parametrize("shape", [(2,), (0, 4), (2, "4")])
def test_invalid_shapes(shape):
    model = torch.nn.Embedding(4, 4)
    with pytest.raises(ValueError, match=r"shapes: expected \(batch, tokens\) pairs of positive integers, got"):
        fastlm.warmup(model, [shape])
