import dataclasses

import torch

from fastlm.training.average import Average
from fastlm.training.loop import train
from fastlm.training.whole import Whole


def test_formula():
    model = torch.nn.Linear(3, 2)
    average, expected = Average(Whole(model, None), 0.6), model.weight.detach().clone()
    for n in range(8):
        with torch.no_grad():
            model.weight += 1
        average.update()
        decay = min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    weights = model.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, weights)


def test_the_average_is_evaluated_and_trains_as_without(small, corpus):
    settings = dataclasses.replace(small, steps=30, eval_every=10)
    plain, averaged = train(settings, corpus), train(dataclasses.replace(settings, ema=0.9), corpus)
    assert averaged.losses == plain.losses
    assert averaged.evaluations != plain.evaluations
    again = train(dataclasses.replace(settings, ema=0.9), corpus)
    assert again.evaluations == averaged.evaluations
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), averaged.model.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), again.model.parameters(), strict=True))
