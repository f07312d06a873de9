"""Every kernel through Triton's real launcher on a stub of the driver that records what it receives (launches.py).

From the second launch of a kind on, kernels/launch.py launches a compiled kernel directly, without Triton's binding of
the arguments. The driver must receive the same.
"""

import collections
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.stub_driver import compile_stub
from tests.kernels.support import kernel_modules
from tests.support import WITH_TRITON

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.nightly,  # compiles every kernel
    pytest.mark.skipif(not WITH_TRITON, reason="needs Triton"),
    pytest.mark.skipif(platform.system() != "Linux" or shutil.which("gcc") is None, reason="needs gcc, on Linux"),
    pytest.mark.skipif(torch.version.hip is not None, reason="PyTorch for ROCm launches another way"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU its driver takes what is launched"),
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("libcuda")
    environment = os.environ | compile_stub(folder)
    done = subprocess.run(
        [sys.executable, str(HERE / "launches.py"), str(folder / "out.json"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def launches(recorded):
    return recorded["launches"]


def named(launch):
    return f"{launch['case']}: {launch['kernel']}"


def test_every_kernel_is_launched(launches):
    every = {name for module in kernel_modules() for name in vars(module) if name.endswith("_kernel")}
    assert {launch["kernel"] for launch in launches} == every


def test_the_driver_receives_the_arguments_of_the_call(launches):
    """In order, with the width of the kernel parameter, without constants, None and 1; then Triton's scratch memory."""
    for launch in launches:
        for way, expected in launch["parameters"].items():
            given = launch["driven"][way]["parameters"]
            assert given[: len(expected)] == expected, f"{named(launch)} {way}"
            assert set(given[len(expected) :]) == {0}, f"{named(launch)} {way}"
        past = launch["driven"]["past"]
        for what in ("kernel", "grid", "block", "shared", "stream"):
            assert past[what] == launch[what], f"{named(launch)}: {what}"


def test_direct_launches_are_like_tritons(launches):
    ways = collections.Counter()
    for launch in launches:
        assert launch["driven"]["past"] == launch["driven"]["again"] == launch["driven"]["own"], named(launch)
        assert launch["same_binary"], f"{named(launch)}: kernels/launch.py takes it for a kind that it is not"
        first, *later = launch["through_triton"]
        ways[first] += 1
        assert later == [0, 0], f"{named(launch)}: through Triton a second time"
        assert launch["parameters"]["first"] != launch["parameters"]["past"], (
            f"{named(launch)}: the same values show nothing"
        )
    assert ways[0] <= 2, ways  # kinds that another case has launched already


def test_a_second_call_is_launched_by_a_plan(recorded):
    """Without the work of kernels/launch.py, with the same arguments, and with the addresses of its own results."""
    planned = 0
    for call in recorded["repeated"]:
        first, second = call["runs"]
        if second["unplanned"]:  # of a mask's gradient more than the launches is to be done
            assert "bias" in call["case"] and second["unplanned"] == first["unplanned"], call["case"]
            continue
        planned += 1
        assert first["unplanned"] and len(first["driven"]) == len(second["driven"]) == len(first["unplanned"])
        moved = dict(zip(first["results"], second["results"], strict=True))
        workspace = {}
        for one, other in zip(first["driven"], second["driven"], strict=True):
            for what in ("kernel", "grid", "block", "shared", "attributes"):
                assert one[what] == other[what], f"{call['case']}: {what}"
            for a, b in zip(one["parameters"], other["parameters"], strict=True):
                if a in moved:
                    assert b == moved[a], call["case"]
                elif a != b:
                    assert min(a, b) > 2**32 and workspace.setdefault(a, b) == b, call["case"]
        assert len(set(workspace.values())) == len(workspace)
    assert planned == 17


def test_descriptors_are_encoded_once_for_each_address(recorded):
    """By the plan, which the second call uses first; each launch receives those of its own tensors."""
    calls = recorded["moved"]
    assert [call["encoded"] for call in calls] == [2, 2, 2, 0, 0]
    for call in calls:
        first, repair = call["driven"]
        for address in call["copied"]:  # as a pointer, and as a descriptor, which the repair has none of
            assert first["parameters"].count(address) == 2 and repair["parameters"].count(address) == 1
