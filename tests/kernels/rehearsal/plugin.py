"""The tests in a rehearsal, in each process of pytest.

A call of the backend triton compiles and launches its kernels on the stub of the driver, and returns what the reference
computes.
"""

import collections
import dataclasses
import json
import math
import os
import random
from pathlib import Path

import pytest

from tests.kernels import stub_driver
from tests.kernels.rehearsal.stand_in import processor_time

found = {"all": 0, "chosen": 0, "finished": 0, "kernels": 0, "errors": []}  # of this process
NEED_THE_DEVICE = "test_gpu"


def answer_by_reference() -> None:
    from fastlm.backends.registry import Registered

    own = Registered.implementation

    def implementation(self, backend):
        found = own(self, backend)
        if backend != "triton":
            return found
        reference = own(self, "reference")

        def both(launches, answer):
            def call(description):
                launches(description)
                return answer(description)

            return call

        backward = found.backward and both(found.backward, reference.backward)
        return dataclasses.replace(found, forward=both(found.forward, reference.forward), backward=backward)

    Registered.implementation = implementation


def record_errors() -> None:
    """Of compilations: tests may fail for other reasons, as no GPU raises what they wait for."""
    from fastlm.kernels import launch

    own = launch.launch_by_triton

    def launch_by_triton(kernel, *arguments):
        try:
            return own(kernel, *arguments)
        except Exception as error:
            found["errors"].append(f"{kernel.__name__}: {' '.join(str(error).split())[:500]}")
            raise

    launch.launch_by_triton = launch_by_triton


def sample(items, n):
    """One in n of the cases of each test, at least one, the same in every run."""
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for name, of_test in cases.items():
        kept |= {*random.Random(name).sample(of_test, math.ceil(len(of_test) / n))}
    return [item for item in items if item in kept]


def pytest_configure(config):
    stub_driver.pretend()
    answer_by_reference()
    record_errors()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks as tests/conftest.py does on a GPU, and takes a sample of what is marked."""
    chosen = []
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if backend == "triton" and item.path.stem != NEED_THE_DEVICE:
            item.add_marker("gpu")
            chosen.append(item)
    kept = sample(chosen, int(os.environ["FASTLM_REHEARSAL_SHARE"]))
    found.update(all=len(chosen), chosen=len(kept))
    dropped = {*items} - {*kept}
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = kept


def pytest_runtest_logfinish(nodeid, location):
    """Writes the counts of this process, which may be stopped at any time, beside the notes of the rehearsal."""
    from fastlm.kernels import launch

    if found["all"]:  # a process that runs tests, not the one that distributes them
        found["finished"] += 1
        counts = found | {"kernels": len(launch.compiled), "processor_seconds": processor_time()}
        Path(os.environ["FASTLM_REHEARSAL"] + f".{os.getpid()}").write_text(json.dumps(counts))
