"""One thread pool: the compiled modules use the OpenMP runtime that PyTorch has loaded."""

import ctypes


class _Symbol(ctypes.Structure):
    """Dl_info of dlfcn.h."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def share(library: str) -> None:
    """Make the runtime that `library` is linked to visible to modules that are loaded later.

    The compiled modules are linked to no runtime. PyTorch's builds for x86-64 make theirs visible, those for Arm do
    not. The runtime is found by a function, since its file has another name in each build.
    """
    process = ctypes.CDLL(None)
    if hasattr(process, "GOMP_parallel"):
        return
    function = getattr(ctypes.CDLL(library), "GOMP_parallel", None)
    symbol = _Symbol()
    if function and process.dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(symbol)):
        ctypes.CDLL(symbol.file.decode(), mode=ctypes.RTLD_GLOBAL)
