"""rotary by PyTorch's operators: those of the definition."""

from fastlm.backends import torch as native
from fastlm.backends.contract import Implementation
from fastlm.ops.rotary.reference import backward, forward

implementation = Implementation(native.backend, forward, backward)
