"""Checks, before a command computes, that the file can be written in which its results go."""

from pathlib import Path

from fastlm.core.errors import mismatch
from fastlm.training.checkpoint import one_line


def check_target(argument: str, file: Path | None) -> None:
    """Raises ValueError if the file cannot be written. `plot`: its suffix must be one of matplotlib's formats."""
    if file is None:
        return
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise mismatch(argument, "a file name in an existing directory", repr(str(file)))
    if argument == "plot":
        check_plot(file)
    if file.exists() and not file.is_file():
        return  # a device or a pipe
    existed = file.exists()
    try:
        with file.open("ab"):
            pass
        if not existed:
            file.unlink()
    except OSError as error:
        raise mismatch(argument, "a file that can be written", f"{str(file)!r} ({one_line(error)})") from None


def check_plot(file: Path) -> None:
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise mismatch("plot", "an installation with matplotlib (pip install 'fastlm[plot]')", "one without") from None
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix[1:].lower() not in formats:
        raise mismatch("plot", f"a file name that ends in one of .{', .'.join(formats)}", repr(str(file)))
