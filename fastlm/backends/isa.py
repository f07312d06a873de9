"""The compiled module of this process: the fastest that was built and that this CPU and operating system can run."""

import importlib
import json
import os
import pathlib
import sys
from types import ModuleType

import torch

from fastlm.backends import openmp

ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "baseline")

# How a module multiplies bfloat16 numbers; the others widen them to float32 as they are packed.
BFLOAT16 = {"amx": "AMX tiles", "avx512_bf16": "AVX-512 BF16 dot products"}


forced = os.environ.get("FASTLM_ISA") or None  # read once, at import


def report() -> dict:
    """What setup.py recorded: the modules, OpenMP or not, the compiler, and the reason if there is no module."""
    path = pathlib.Path(__file__).parent.parent / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def features() -> ModuleType | None:
    """The module that queries the CPU; None where it was not built."""
    try:
        return importlib.import_module("fastlm._cpu_features")
    except ImportError:
        return None


def usable() -> list[str]:
    """The ISAs that this machine can run, the widest first."""
    module = features()
    return module.isas() if module else []


def by_speed(usable: list[str], vendor: str) -> list[str]:
    """The order in which modules are tried.

    Intel's cores run the bf16 dot product at half the rate of fp32 multiply-adds: there, widening is faster.
    """
    if vendor != "GenuineIntel" or "avx512" not in usable:
        return usable
    return sorted(usable, key=lambda isa: ("amx", "avx512").index(isa) if isa in ("amx", "avx512") else 2)


def find() -> tuple[ModuleType | None, str | None, str]:
    """(module, its ISA, why there is none).

    Raises:
        ValueError: FASTLM_ISA forces an ISA that cannot be used.
    """
    here = usable()
    if forced and forced not in ISAS:
        raise ValueError(f"FASTLM_ISA: expected one of {', '.join(ISAS)}, got {forced!r}")
    if forced and here and forced not in here:
        raise ValueError(f"FASTLM_ISA: expected one of {', '.join(here)}, which this CPU can run, got {forced!r}")
    reasons = []
    module = features()
    for isa in [forced] if forced else by_speed(here, module.vendor() if module else ""):
        try:
            return importlib.import_module(f"fastlm._cpu_{isa}"), isa, ""
        except ModuleNotFoundError:
            reasons.append(f"no module for {isa} was built")
        except ImportError as error:  # built, but for another Python or with a missing library
            reasons.append(f"the module for {isa} does not load ({error})")
    if forced:
        raise ValueError(f"FASTLM_ISA: expected an ISA that was built, got {forced!r} ({', '.join(reasons)})")
    return None, None, report().get("reason") or ", ".join(reasons) or "the extension was not built"


def find_or_report() -> tuple[ModuleType | None, str | None, str, str]:
    """find() and why FASTLM_ISA cannot be obeyed, or "".

    As a wrong FASTLM_BACKEND, a wrong FASTLM_ISA is an error of the first call and not of the import.
    """
    try:
        return *find(), ""
    except ValueError as error:
        return None, None, str(error), str(error)


def forced_summary() -> str:
    """For fastlm.info(): the module that is forced; "" if none is."""
    if wrong_isa:
        return f"{wrong_isa} (every call is this error)"
    return f"compiled module {forced} (FASTLM_ISA={forced})" if forced else ""


if sys.platform == "linux":
    openmp.share(torch._C.__file__)
kernels, name, missing, wrong_isa = find_or_report()
