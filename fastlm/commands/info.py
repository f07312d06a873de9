"""fastlm info: the report; with --measure, what the machine can do and who serves are measured first, on the CPU and on each kind of GPU."""

import torch

import fastlm
from fastlm.backends import isa, table
from fastlm.benchmarking import choose, report, rules
from fastlm.benchmarking.compare import DTYPES
from fastlm.benchmarking.gpu import plan
from fastlm.benchmarking.gpu.report import ratios
from fastlm.commands.display import say

SECONDS = 120  # for a GPU; what has begun by then comes to its end


def run(*, measure: bool) -> None:
    if measure:
        if isa.kernels or not table.cards():
            rules.remember({table.cpu(): measured_cpu()})
        else:
            say(f"no compiled module ({isa.missing}): the CPU is not measured")
        for card, index in table.cards().items():
            found = measured_gpu(card, index)
            if found is not None:
                rules.remember({card: found})
        say(f"remembered in {table.user_table()}")
        say()
    print(fastlm.info())


def measured_cpu() -> list[table.Rule]:
    for line in report.peaks_in_words(report.machine(sorted({1, torch.get_num_threads()}), list(DTYPES))):
        say(line)
    verdicts = []
    for seen in choose.measure():
        verdicts.append(seen)
        winner = "PyTorch's operator serves" if seen.torch_wins else "fastlm's kernel serves"
        say(f"{seen.operator:20} {seen.dtype:8} {seen.rows:5} rows: {seen.ratio} times as fast as PyTorch; {winner}")
    return choose.rules(verdicts)


def measured_gpu(card: str, index: int) -> list[table.Rule] | None:
    """None where there was nothing to compare."""
    say(card)
    now, rows = plan.Run(SECONDS), []
    with torch.cuda.device(index):
        for row in now.measure("cuda", (*plan.FIRST, *plan.THEN), rivals=False):
            rows.append(row)
            say(
                f"{row.operator} {row.shape}, {row.dtype}, {row.direction}, {row.served_by}: {row.seconds * 1e6:,.1f} µs; {ratios(row.backends)}"
            )
    for title, what in (("failed", now.failed), ("left out, as time ran out", now.left_out)):
        for line in what:
            say(f"{title}: {line}")
    if not any(row.backends for row in rows):
        say("nothing to choose between: none of its backends, or only one, can serve")
        return None
    return rules.of_rows(rows)
