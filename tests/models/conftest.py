import pytest
import torch

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def one_thread():
    """For tiny models: on work this small threads mostly wait for one another, for seconds where the machine is busy with something else."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def all_threads(one_thread):
    """For models of a real size."""
    torch.set_num_threads(THREADS)
