"""What computes: see choice.py for who serves a call. (The names live there because the backend `torch` hides PyTorch's own name in here.)"""

from fastlm.backends.choice import Unsupported, choose, load, name_of, requested, use_backend

__all__ = ["Unsupported", "choose", "load", "name_of", "requested", "use_backend"]
