"""What the tests of the kernels share."""

import importlib
from pathlib import Path

import fastlm.backends.triton  # noqa: F401 (registers the operators, and finds fastlm.kernels in a checkout)
from fastlm.backends import registry

KERNELS = Path(__file__).parents[2] / "kernels"


def kernel_modules():
    """The modules with Triton kernels. Each launches through its own name `launch`."""
    names = sorted(file.stem for file in KERNELS.glob("*.py") if file.stem not in ("launch", "__init__"))
    modules = [importlib.import_module(f"fastlm.kernels.{name}") for name in names]
    return [module for module in modules if hasattr(module, "launch")]


def forward(operator, backend, *arguments):
    """The results of a forward call, given as the fields of the operator's Forward."""
    call = importlib.import_module(f"fastlm.ops.{operator}.spec").Forward(*arguments)
    return registry.operators()[operator].implementation(backend).forward(call)


def backward(operator, backend, *arguments):
    """The gradients of a backward call, given as the fields of the operator's Backward."""
    call = importlib.import_module(f"fastlm.ops.{operator}.spec").Backward(*arguments)
    return registry.operators()[operator].implementation(backend).backward(call)


def set_architecture(setattr, name):
    """Makes the Triton implementations look up launch configurations of another GPU; setattr may be monkeypatch's."""
    for operator in ("attention", "gelu_mlp", "glu_mlp"):
        setattr(importlib.import_module(f"fastlm.ops.{operator}.triton"), "architecture", lambda index: name)
