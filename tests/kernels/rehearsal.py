"""`make gpu-test` without a GPU: a pytest plugin that times what the tests do besides computing.

    python -m tests.kernels.rehearsal OUT.json [ARGUMENTS OF PYTEST…]

The tests of the operators call the Triton kernels with CPU tensors as if they were on an H100. Each kind of launch is
compiled, which takes most of the time on a GPU, and sent to a stub of the driver (stub_libcuda.c). Results are what
memory held, so tests fail; only the time counts. OUT.json gets the seconds: of the wall clock, of the processor, how
many tests ran and how many kernels were compiled.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
PLUGIN = "tests.kernels.rehearsal"
finished: list[str] = []  # tests


def stub(folder: Path) -> dict[str, str]:
    """Compiles the stub of the driver into a folder; the environment of a process that uses it."""
    nvidia = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia"
    command = ["gcc", "-shared", "-fPIC", f"-I{nvidia / 'include'}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, str(HERE / "stub_libcuda.c"), "-o", str(folder / "libcuda.so.1")], check=True)
    return {
        "TRITON_INTERPRET": "0",
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),  # a launcher linked with the stub must not be used on a GPU later
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path]),
    }


def pytest_configure(config):
    """Before any test: the stub takes the launches, and the backend takes CPU tensors."""
    from fastlm.backends import triton as backend
    from tests.kernels import launches

    launches.drive(Path(os.environ["TRITON_LIBCUDA_PATH"]), count=False)
    backend.Triton.unavailable = lambda self: []
    backend.Triton.refuses = lambda self, device, dtype: []
    backend.gpu_refusals = lambda index: []
    from tests.kernels.support import set_architecture

    set_architecture(setattr, "sm_90")
    config.rehearsal_began = time.monotonic()


def pytest_runtest_logfinish(nodeid, location):
    finished.append(nodeid)


def pytest_unconfigure(config):
    from fastlm.kernels import launch

    used = os.times()
    found = {
        "seconds": time.monotonic() - config.rehearsal_began,
        "processor_seconds": used.user + used.system + used.children_user + used.children_system,
        "kernels": len(launch.compiled),
        "tests": len(finished),
    }
    Path(os.environ["FASTLM_REHEARSAL"]).write_text(json.dumps(found, indent=1) + "\n")


def main(out: Path, folder: Path, *arguments: str) -> dict[str, float]:
    """Runs the tests in `folder`, which gets the stub and what is compiled, and returns what OUT.json holds."""
    environment = os.environ | stub(folder) | {"FASTLM_REHEARSAL": str(out), "FASTLM_TEST_BACKENDS": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", PLUGIN, "-p", "no:cacheprovider", "--tb=no", "--no-summary"]
    done = subprocess.run(
        [*command, *arguments], env=environment, cwd=HERE.parents[1], stdout=subprocess.PIPE, text=True
    )
    if not out.exists():
        raise RuntimeError(done.stdout[-2000:])
    return json.loads(out.read_text())


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        print(main(Path(sys.argv[1]).absolute(), Path(temporary), *(sys.argv[2:] or ["tests/ops", "-k", "triton"])))
