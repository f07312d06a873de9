import numpy as np
import pytest
import torch

from fastlm.training.data import Tokens


@pytest.fixture(params=[1, 3, 50])
def tokens(request):
    """The numbers from 0 to 49 in shards of one size, in documents of 5, 0, 12 and 33."""
    ids = np.arange(50, dtype=np.uint16)
    size = request.param
    return Tokens([ids[i : i + size] for i in range(0, 50, size)], np.array([5, 5, 17, 50]))


def test_reading(tokens):
    assert len(tokens) == 50 and tokens.dtype == np.uint16
    assert tokens[:].tolist() == list(range(50)) and tokens[3:40:7].tolist() == list(range(3, 40, 7))
    assert tokens[60:].tolist() == []
    windows = tokens.windows(torch.tensor([0, 13, 43]), 7)
    assert windows.dtype == torch.int64 and windows.tolist() == [[i + j for j in range(7)] for i in (0, 13, 43)]


def test_two_parts(tokens):
    first, second = tokens.cut(20)
    assert first[:].tolist() == list(range(20)) and second[:].tolist() == list(range(20, 50))
    assert second.windows(torch.tensor([5]), 3).tolist() == [[25, 26, 27]]
    third, fourth = second.cut(10)
    assert third[:].tolist() == list(range(20, 30)) and len(fourth) == 20


def test_positions_in_documents(tokens):
    begins, length = torch.tensor([0, 3, 4, 5, 10, 17, 30]), 10
    for row, begin in zip(tokens.positions(begins, length), begins.tolist(), strict=True):
        first = {i: max(end for end in (0, 5, 17, begin) if end <= i) for i in range(begin, begin + length)}
        assert row.tolist() == [i - first[i] for i in range(begin, begin + length)]
    _, second = tokens.cut(10)
    assert second.positions(torch.tensor([3]), 6).tolist() == [[0, 1, 2, 3, 0, 1]]
    assert Tokens(tokens.shards).positions(torch.tensor([3]), 6).tolist() == [[0, 1, 2, 3, 4, 5]]
