"""python -m tests.cuda_emulation: compiles the CUDA kernels of csrc/cuda for the CPU, as fastlm/_cuda_emulated.

With FASTLM_CUDA_EMULATION=1 the tests use it as the module of the cuda backend.
"""

import os
import shutil
import sys

from tests.cuda_emulation.build import ROOT, build

HOST_ONLY = ["device.cu"]  # queries the CUDA driver


def main() -> None:
    kernels = [source for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) if source.name not in HOST_ONLY]
    try:
        module = build("_cuda_emulated", kernels, sorted((ROOT / "csrc/bindings/cuda").glob("*.cpp")))
    except RuntimeError as failure:
        sys.exit(str(failure))
    installed = ROOT / "fastlm" / module.name
    if not installed.exists() or installed.stat().st_mtime < module.stat().st_mtime:
        fresh = installed.with_suffix(".new")  # not overwritten in place, because a running process may have mapped it
        shutil.copyfile(module, fresh)
        os.replace(fresh, installed)
    print(installed)


if __name__ == "__main__":
    main()
