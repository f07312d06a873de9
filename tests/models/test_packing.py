import torch

from fastlm.models import packing


def test_gather_and_scatter_gradients():
    index = torch.tensor([0, 2, 3, 7])
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for function, inputs in ((packing.Gather.apply, (x, index)), (packing.Scatter.apply, (y, index, 8))):
        assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)
