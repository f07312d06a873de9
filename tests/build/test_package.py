"""The source archive contains everything that a build needs (ways_of_installing.sh installs from it)."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Files of builds, runs and virtual environments in a checkout.
LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv", ".models", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "_build.json", ".*_cache"
)


def test_sdist_holds_what_a_build_needs_and_nothing_built(tmp_path):
    copy = tmp_path / "copy"
    # tests/build is part of the archive, the top-level build is not
    shutil.copytree(
        ROOT,
        copy,
        ignore=lambda folder, names: LEFT_BEHIND(folder, names) - ({"build"} if Path(folder) != ROOT else set()),
    )
    (copy / "fastlm/_build.json").write_text("{}")
    (copy / "fastlm/_cpu_old.so").write_text("")
    build = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    archive = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]
    with tarfile.open(tmp_path / archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    needed = [
        "csrc/**/*.cpp",
        "csrc/**/*.h",
        "csrc/cuda/*.cu*",
        "fastlm/**/*.py",
        "kernels/*.py",
        "benchmarks/**/*.py",
        "docs/*.md",
    ]
    needed += ["tests/**/*.py", "tests/**/*.sh", "tests/cuda_emulation/**/*"]
    needed = {str(file.relative_to(copy)) for pattern in needed for file in copy.glob(pattern) if file.is_file()}
    assert "kernels/attention.py" in needed
    needed |= {"setup.py", "pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "fastlm/py.typed"}
    assert {
        "csrc/bindings/module.cpp",
        "csrc/cpu/cpu_features.cpp",
        "csrc/cpu/gemm.h",
        "csrc/cuda/layernorm_residual.cu",
        "tests/build/smoke.py",
    } <= needed
    assert needed - inside == set()
    assert not [name for name in inside if name.endswith((".so", ".pyc", "_build.json"))]
