"""fastlm info: the report; with --measure, what the machine can do and who serves are measured first."""

import torch

import fastlm
from fastlm.backends import table
from fastlm.benchmarking import choose, report, rules
from fastlm.benchmarking.compare import DTYPES
from fastlm.commands.display import say


def run(*, measure: bool) -> None:
    if measure:
        for line in report.peaks_in_words(report.machine(sorted({1, torch.get_num_threads()}), list(DTYPES))):
            say(line)
        verdicts = []
        for seen in choose.measure():
            verdicts.append(seen)
            winner = "PyTorch's operator serves" if seen.torch_wins else "fastlm's kernel serves"
            say(f"{seen.operator:20} {seen.dtype:8} {seen.rows:5} rows: {seen.ratio} times as fast as PyTorch; {winner}")
        rules.remember({table.cpu(): choose.rules(verdicts)})
        say(f"remembered in {table.user_table()}")
        say()
    print(fastlm.info())
