import math

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fastlm.models.decoding.sampling import Sampling, sample_without_sync

DRAWS = 40_000


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 5, 50, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.5, 0.9, 1.0])
def test_filtered_logits_equal_hugging_faces(temperature, top_k, top_p):
    logits = 3 * torch.randn(8, 50)
    logits[0, :10] = logits[0].max()  # ties
    logits[1] = torch.tensor([0.0] * 4 + [-torch.inf] * 46)  # cumulative probabilities hit 0.5 exactly
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None and top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    own = Sampling(temperature, top_k, top_p).filtered(logits)
    assert torch.equal(own, expected)
    assert own.isfinite().any(-1).all()


def test_samples_follow_the_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    for sampling in (Sampling(1.0), Sampling(0.5), Sampling(2.0), Sampling(top_k=3), Sampling(1.5, top_p=0.8)):
        expected = sampling.filtered(logits).softmax(-1)
        drawn = sampling.choose(logits.expand(DRAWS, -1), torch.Generator().manual_seed(1))
        found = torch.bincount(drawn, minlength=5) / DRAWS
        # five standard errors of a frequency; excluded tokens never occur
        assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / DRAWS).sqrt()).all()
        assert not found[expected == 0].any()


def test_sample_without_sync_equals_multinomial():
    """The GPU path, run on the CPU: the same tokens, and the same generator state afterwards."""
    probabilities = (3 * torch.randn(200, 60)).softmax(-1)
    probabilities[probabilities < 0.01] = 0
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    for _ in range(10):
        expected = torch.multinomial(probabilities, 1, generator=generators[0])[:, 0]
        assert torch.equal(sample_without_sync(probabilities, generators[1]), expected)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    with pytest.raises(RuntimeError):
        sample_without_sync(torch.tensor([[0.5, torch.nan]]), None)


def test_greedy_by_default():
    logits = torch.randn(6, 50)
    for sampling in (Sampling(), Sampling(0), Sampling(0.0, top_k=5, top_p=0.5), Sampling(1e-40), Sampling(5e-324)):
        assert sampling.greedy and torch.equal(sampling.choose(logits, None), logits.argmax(-1))
    assert not Sampling(top_k=5).greedy and not Sampling(top_p=0.5).greedy and not Sampling(1.0).greedy
    assert torch.equal(Sampling(top_k=1).choose(logits, None), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-5, 1e-15, 2e-20])
def test_low_temperatures_choose_the_most_likely_token(temperature):
    logits = 1e4 * torch.randn(6, 50)
    assert not Sampling(temperature).greedy
    assert torch.equal(Sampling(temperature).choose(logits, None), logits.argmax(-1))


def test_16_bit_logits_are_sampled_in_float32():
    logits = torch.randn(3, 50).bfloat16()
    assert torch.equal(
        Sampling(1.0).choose(logits, torch.Generator().manual_seed(1)),
        Sampling(1.0).choose(logits.float(), torch.Generator().manual_seed(1)),
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -0.1}, "temperature: expected a finite number >= 0, got -0.1"),
        ({"temperature": math.nan}, "temperature: expected a finite number >= 0, got nan"),
        ({"temperature": math.inf}, "temperature: expected a finite number >= 0, got inf"),
        ({"top_k": 0}, "top_k: expected an integer >= 1, got 0"),
        ({"top_k": 2.5}, "top_k: expected an integer >= 1, got 2.5"),
        ({"top_p": 0}, r"top_p: expected a probability in \(0, 1\], got 0"),
        ({"top_p": 1.1}, r"top_p: expected a probability in \(0, 1\], got 1.1"),
        ({"top_p": math.nan}, r"top_p: expected a probability in \(0, 1\], got nan"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
