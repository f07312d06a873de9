import collections
import importlib.util
import math
import os
import random
import signal
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton kernels run under the interpreter, which must be enabled before Triton is imported.
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastlm

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from tests.kernels import interpreter

    interpreter.install()
if os.environ.get("FASTLM_CUDA_EMULATION") == "1":
    from tests.cuda_emulation import backend

    backend.install()

# A shell ignores Ctrl-C in what a script runs in the background, and processes inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# test_mutants.py runs tests on a mutated copy of the package; importing another copy would prove nothing.
if wanted := os.environ.get("FASTLM_TEST_PACKAGE"):
    assert Path(fastlm.__file__).is_relative_to(wanted), (
        f"{fastlm.__file__} is not the package under test, which is in {wanted}"
    )


ON_GPU = os.environ.get("FASTLM_TEST_DEVICE") == "cuda"  # operator tests on a GPU, see `make gpu`
if ON_GPU:
    torch.set_default_device("cuda")


# Backends that are interpreted or emulated on the CPU, which is slow: (n, variable), one case in n runs.
SAMPLED = {}
if os.environ.get("TRITON_INTERPRET") == "1":
    SAMPLED["triton"] = 18, "FASTLM_TEST_INTERPRETED"
if os.environ.get("FASTLM_CUDA_EMULATION") == "1":
    SAMPLED["cuda"] = 3, "FASTLM_TEST_EMULATED"


def pytest_collection_modifyitems(config, items):
    """Marks the tests that run on a GPU. Without one, deselects all but a sample of the interpreted and emulated cases.

    Of each file one case in so many runs. FASTLM_TEST_INTERPRETED=n and FASTLM_TEST_EMULATED=n, which CI and `make
    emulated` set, run one in n of each test, and at least one; 1 runs all. The sample depends on names only, so it is
    the same on every run. Tests marked `unsampled` always run all cases.
    """
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker("slow")
    backend_of = {item: item.callspec.params.get("backend") for item in items if getattr(item, "callspec", None)}
    if ON_GPU:
        for item, backend in backend_of.items():
            if backend in ("triton", "cuda"):
                item.add_marker("gpu")
        return
    cases = collections.defaultdict(list)
    for item, backend in backend_of.items():
        if backend in SAMPLED and not item.get_closest_marker("unsampled"):
            name = item.function.__qualname__ if SAMPLED[backend][1] in os.environ else item.path.stem
            cases[name, backend, item.path].append(item)
    deselected = set()
    for (name, backend, _), items_of_name in cases.items():
        n, variable = SAMPLED[backend]
        count = math.ceil(len(items_of_name) / int(os.environ.get(variable, n)))
        deselected |= set(items_of_name) - set(random.Random(name).sample(items_of_name, count))
    if deselected:
        config.hook.pytest_deselected(items=list(deselected))
        items[:] = [item for item in items if item not in deselected]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread(request):
    """Runs tests of small models on one thread: several would mostly wait for each other.

    Operator tests use all threads.
    """
    if request.path.parent.name not in ("encoding", "generation", "integrations", "models"):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
