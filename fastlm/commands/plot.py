"""fastlm plot: the metrics of training runs as an image or a page."""

from pathlib import Path

from fastlm.commands.display import quantity, say
from fastlm.commands.targets import check_target
from fastlm.training.plots import Curves, write


def run(runs: list[Path], *, out: list[Path]) -> None:
    for file in out:
        check_target("out", file)
    curves = [Curves.read(path) for path in runs]
    for file in out:
        write(file, curves)
        say(f"{quantity(len(curves), 'run')} plotted in {file}")
