"""What the tests of the kernels share."""

import importlib

import fastlm  # noqa: F401 (registers the operators)
from fastlm.backends import registry

MODULES = (
    "attention",
    "attention_backward",
    "attention_decode",
    "gelu_mlp",
    "layernorm_residual",
    "linear_cross_entropy",
)


def kernel_modules():
    """The modules with Triton kernels. Each launches through its own name `launch`."""
    return [importlib.import_module(f"fastlm.kernels.{name}") for name in MODULES]


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
    for operator in ("attention", "gelu_mlp"):
        setattr(importlib.import_module(f"fastlm.ops.{operator}.triton"), "architecture", lambda index: name)
