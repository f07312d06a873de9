"""Walks over the modules of a model."""

import pytest
import torch
from torch import nn

from fastlm.core.modules import evaluation_mode, first_parameter, submodules


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Sequential(nn.Embedding(3, 4), nn.Dropout())
        self.pooler = None
        self.register_module("head", None)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(), nn.ModuleList()])


def test_all_modules_and_those_outside_lists():
    model = Model()
    assert set(submodules(model)) == set(model.modules()) and submodules(model)[0] is model
    outside = [model, model.embeddings, model.layers, *model.embeddings]
    assert submodules(model, of_each_list=0) == outside
    assert submodules(model, of_each_list=1) == [*outside, model.layers[0]]
    model.layers.append(model.layers[0])  # shared
    assert submodules(model).count(model.layers[0]) == 2


@pytest.mark.parametrize("path", ["", "embeddings.1", "layers.1", "layers.2"])
def test_the_mode_of_every_module_is_restored(path):
    model = Model().eval()
    one = model.get_submodule(path)
    one.training = True
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module for module in model.modules() if module.training] == [one]


def test_first_parameter():
    model = Model()
    assert first_parameter(model) is model.embeddings[0].weight is next(model.parameters())
    model.embeddings[0].weight = None
    assert first_parameter(model) is model.layers[0].weight
    default = torch.zeros(1)
    assert first_parameter(nn.Dropout(), default) is default and first_parameter(nn.ModuleList([nn.Dropout()])) is None
