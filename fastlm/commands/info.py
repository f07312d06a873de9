"""fastlm info: prints the report of fastlm.info().

With --measure, the machine's peaks and the fastest backends are measured first, on the CPU and on each GPU model.
"""

import torch

import fastlm
from fastlm.backends import isa, table
from fastlm.benchmarking import choose, report, rules
from fastlm.benchmarking.compare import DTYPES
from fastlm.benchmarking.gpu import plan
from fastlm.benchmarking.gpu.report import ratios
from fastlm.commands.display import say

SECONDS = 120  # per GPU model; no case is started after that


def run(*, measure: bool) -> None:
    if measure:
        if isa.kernels or not table.cards():
            rules.remember({table.cpu(): measure_cpu()})
        else:
            say(f"the CPU is not measured: no compiled module ({isa.missing})")
        for card, index in table.cards().items():
            found = measure_gpu(card, index)
            if found is not None:
                rules.remember({card: found})
        say(f"saved to {table.user_table()}")
        say()
    print(fastlm.info())


def measure_cpu() -> list[table.Rule]:
    for line in report.peaks_in_words(report.machine(sorted({1, torch.get_num_threads()}), list(DTYPES))):
        say(line)
    verdicts = []
    for verdict in choose.measure():
        verdicts.append(verdict)
        selected = "torch" if verdict.torch_wins else "cpu"
        case = f"{verdict.operator:20} {verdict.dtype:8} {verdict.rows:5} rows"
        say(f"{case}: {verdict.ratio} × PyTorch's speed; backend: {selected}")
    return choose.rules(verdicts)


def measure_gpu(card: str, index: int) -> list[table.Rule] | None:
    """None if fewer than two backends are available."""
    say(card)
    run, rows = plan.Run(SECONDS), []
    with torch.cuda.device(index):
        for row in run.measure("cuda", (*plan.FIRST, *plan.THEN), rivals=False):
            rows.append(row)
            case = f"{row.operator} {row.shape}, {row.dtype}, {row.direction}, {row.served_by}"
            say(f"{case}: {row.seconds * 1e6:,.1f} µs; {ratios(row.backends)}")
    for title, cases in (("failed", run.failed), ("skipped, out of time", run.left_out)):
        for case in cases:
            say(f"{title}: {case}")
    if not any(row.backends for row in rows):
        say("nothing to compare: fewer than two backends are available")
        return None
    return rules.of_rows(rows)
