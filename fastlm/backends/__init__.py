"""Backends: the contract, the registry of operators, backend selection, and what each backend's implementations share.

The names live in `selection` because the module `torch` in here would hide PyTorch's own.
"""

from fastlm.backends.selection import requested, use_backend
from fastlm.core.errors import Unsupported

__all__ = ["Unsupported", "requested", "use_backend"]
