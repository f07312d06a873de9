import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """On models this small threads mostly wait for one another, for seconds where the machine is busy. The operators' tests use them all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
