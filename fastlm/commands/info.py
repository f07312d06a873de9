"""fastlm info: prints the report of fastlm.info().

With --measure, the machine's peaks and the fastest backends are measured first, on the CPU and on each GPU model.
"""

import torch

import fastlm
from fastlm.backends import isa, table, table_files
from fastlm.backends.rule import Rule
from fastlm.benchmarking import operators, report, rules
from fastlm.benchmarking import table as measured_table
from fastlm.benchmarking.compare import DTYPES
from fastlm.benchmarking.gpu import plan
from fastlm.commands.display import say

SECONDS = 120  # per GPU model; no case is started after that


def run(*, measure: bool) -> None:
    if measure:
        if isa.kernels or not table.gpus():
            table_files.save({table.cpu_key(): measure_cpu()})
        else:
            say(f"the CPU is not measured: no compiled module ({isa.missing})")
        for card, index in table.gpus().items():
            found = measure_gpu(card, index)
            if found is not None:
                table_files.save({card: found})
        say(f"saved to {table.user_table()}")
        say()
    print(fastlm.info())


def measure_cpu() -> list[Rule]:
    for line in report.peaks_in_words(report.machine(sorted({1, torch.get_num_threads()}), list(DTYPES))):
        say(line)
    rows = []
    for row in measured_table.measure():
        rows.append(row)
        selected = "torch" if measured_table.torch_is_faster(row) else "cpu"
        case, ratio = f"{row.operator} {row.shape}, {row.dtype}", row.backends["torch"].ratio
        say(f"{case}: speedup over PyTorch {ratio}; backend: {selected}")
    return rules.rules_of(rows, operators.axes("cpu"), "cpu")


def measure_gpu(card: str, index: int) -> list[Rule] | None:
    """None if fewer than two backends are available."""
    say(card)
    run, rows = plan.Run(SECONDS), []
    first, then = plan.planned()
    with torch.cuda.device(index):
        for row in run.measure("cuda", [*first, *then], baselines=False):
            rows.append(row)
            case = f"{row.operator} {row.shape}, {row.dtype}, {row.direction}, {row.backend}"
            say(f"{case}: {row.seconds * 1e6:,.1f} µs; {report.ratios(row.backends)}")
    for title, cases in (("failed", run.failed), ("skipped, out of time", run.left_out)):
        for case in cases:
            say(f"{title}: {case}")
    if not any(row.backends for row in rows):
        say("nothing to compare: fewer than two backends are available")
        return None
    return rules.rules_of(rows, operators.axes("cuda"), "cuda")
