import collections
import importlib.util
import math
import os
import random
from pathlib import Path

import pytest
import torch

# Where there is no GPU, Triton's kernels run under its interpreter. It is asked for before anything imports Triton.
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastlm

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from tests.kernels import interpreter

    interpreter.install()
if os.environ.get("FASTLM_CUDA_EMULATION") == "1":
    from tests.cuda_emulation import backend

    backend.install()

# Where the package under test must lie, if someone (test_mutants.py) says so: another copy that happened to be found first would prove nothing.
if wanted := os.environ.get("FASTLM_TEST_PACKAGE"):
    assert Path(fastlm.__file__).is_relative_to(wanted), (
        f"{fastlm.__file__} is not the package under test, which is in {wanted}"
    )


ON_GPU = os.environ.get("FASTLM_TEST_DEVICE") == "cuda"  # the tests of the operators on a GPU: see `make gpu`
if ON_GPU:
    torch.set_default_device("cuda")


# Backends whose kernels run on the CPU in a way made for checking, not for speed: of how many cases one runs.
SAMPLED = {}
if os.environ.get("TRITON_INTERPRET") == "1":
    SAMPLED["triton"] = int(os.environ.get("FASTLM_TEST_INTERPRETED", 18))
if os.environ.get("FASTLM_CUDA_EMULATION") == "1":
    SAMPLED["cuda"] = int(os.environ.get("FASTLM_TEST_EMULATED", 3))


def pytest_collection_modifyitems(config, items):
    """What runs on a GPU is marked so. Where Triton is interpreted or the CUDA kernels are emulated, a sample runs: of each test one case in n, and one at
    least, drawn by the test's name, the same on every run. FASTLM_TEST_INTERPRETED and FASTLM_TEST_EMULATED say which n, as CI and `make emulated` do with a
    smaller one; 1 takes all. What is marked `unsampled` runs in all its cases.
    """
    backend_of = {item: item.callspec.params.get("backend") for item in items if getattr(item, "callspec", None)}
    if ON_GPU:
        for item, backend in backend_of.items():
            if backend in ("triton", "cuda"):
                item.add_marker("gpu")
        return
    cases = collections.defaultdict(list)
    for item, backend in backend_of.items():
        if backend in SAMPLED and not item.get_closest_marker("unsampled"):
            cases[item.function, backend].append(item)
    left_out = set()
    for (function, backend), of_one_test in cases.items():
        wanted = math.ceil(len(of_one_test) / SAMPLED[backend])
        left_out |= set(of_one_test) - set(random.Random(function.__qualname__).sample(of_one_test, wanted))
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread(request):
    """On models as small as the tests' threads mostly wait for one another, for seconds where the machine is busy. The operators' tests use them all."""
    if request.path.parent.name not in ("generation", "integrations", "models"):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
