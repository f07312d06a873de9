"""Results read back from JSON, and the committed results of docs/."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastlm.benchmarking import plots, report, saved
from fastlm.benchmarking.compare import Baseline, Row
from fastlm.benchmarking.machine import Work
from fastlm.benchmarking.measure import Ratio
from fastlm.commands import bench
from tests.benchmarks.test_report import check_picture

RESULTS = sorted((Path(__file__).parents[2] / "docs" / "results").glob("*.json"))
MACHINE = {"cpu": "A CPU", "isa": "avx2", "fastlm": "0.1", "torch": "2", "command": "fastlm bench", "peaks": {}}
ROWS = [
    Row(
        *("linear", "1024 × 768", "float32", 2, "forward", "cpu", 1e-3),
        baselines={
            "eager": Baseline(2e-3, Ratio(2.0, 1.9, 2.1), 1000),
            "compiled": Baseline(3e-3, Ratio(3.0, 2.9, 3.1)),
        },
        work=Work(1e9, 1e6),
    ),
    Row(
        *("training_step", "GPT-2", "bfloat16", 1, "step", "cpu, torch", 1.0),
        baselines={"eager": Baseline(2.0, Ratio(2.0, 1.9, 2.1))},
        tokens=1024,
        recompute=1,
    ),
]


def test_rows_are_read_back(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(report.as_json(ROWS, MACHINE)))
    assert saved.read("from", file) == (ROWS, MACHINE, {"failed": [], "left_out": []})


def test_an_earlier_run_is_shown(tmp_path, capsys):
    file, table = tmp_path / "results.json", tmp_path / "results.md"
    file.write_text(json.dumps(report.as_json(ROWS, MACHINE)))
    bench.show(file, bench.Files(markdown=table))
    assert "linear: 1024 × 768" in capsys.readouterr().out
    assert "| `linear` | float32 | 2 | 2.00 [1.90–2.10] |" in table.read_text() and "fastlm bench" in table.read_text()


CARD = {
    "card": "A card",
    "fastlm": "0.1",
    "torch": "2",
    "triton": "3",
    "peaks": {"copy_bytes_per_second": 1e12, "float32_product_flops_per_second": 1e13},
}


def test_an_earlier_run_on_a_gpu_is_shown(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    source, ended = tmp_path / "gpu.json", {"failed": ["linear: out of memory"], "left_out": ["gelu_mlp"]}
    rows = [dataclasses.replace(ROWS[0], backend="triton", threads=None)]
    source.write_text(json.dumps(report.as_json(rows, CARD) | ended | {"stopped": False}))
    assert saved.read("from", source) == (rows, CARD, ended)
    files = bench.Files(*(tmp_path / name for name in ("again.json", "table.md", "plot.png")))
    bench.show(source, files)
    out = capsys.readouterr().out
    assert "A card, fastlm 0.1" in out and "- linear: out of memory" in out
    assert files.markdown.read_text() == report.gpu_markdown(rows, CARD, **ended)
    assert saved.read("from", files.json) == (rows, CARD, ended)
    assert files.plot.read_bytes().startswith(b"\x89PNG")


def test_rows_of_a_gpu_without_baselines_have_no_plot(tmp_path, capsys):
    source, plot = tmp_path / "gpu.json", tmp_path / "plot.png"
    source.write_text(json.dumps(report.as_json([dataclasses.replace(ROWS[0], baselines={})], CARD)))
    bench.show(source, bench.Files(plot=plot))
    assert "no plot: no baseline was measured" in capsys.readouterr().out and not plot.exists()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no JSON: .*"),
        ("[]", "no JSON object"),
        ('{"rows": [{}], "machine": {}}', "rows with other fields"),
        ('{"rows": [3], "machine": {}}', "rows with other fields"),
        ('{"rows": [], "machine": {}}', "machine without a name"),
        ('{"rows": [], "machine": null}', "rows with other fields"),
        ('{"machine": {}}', "without 'rows'"),
        ('{"rows": []}', "without 'machine'"),
    ],
)
def test_other_files_are_refused(tmp_path, text, reason):
    file, expected = tmp_path / "other.json", "^from: expected a file written by `fastlm bench --json`, got "
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"{expected}'.*other\.json' \({reason}\)$"):
        saved.read("from", file)
    with pytest.raises(ValueError, match=rf"{expected}'.*' \(Is a directory\)$"):
        saved.read("from", tmp_path)


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_committed_results_can_be_shown(tmp_path, file):
    pytest.importorskip("matplotlib")
    rows, machine, _ = saved.read("from", file)
    plots.draw(tmp_path / "plot.png", plots.figure_of(rows, machine))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    check_picture(plots.figure_of(rows, machine))
    assert report.markdown(rows, machine) == file.with_suffix(".md").read_text()
