import dataclasses

import pytest
from rich.console import Console

from fastlm.benchmarking import plots, report
from fastlm.benchmarking.compare import Baseline, Row
from fastlm.benchmarking.machine import Work
from fastlm.benchmarking.measure import Ratio
from fastlm.commands.bench_screen import screen_tables, seconds_in_words
from tests.support import check_drawn

DESCRIBED = {
    "cpu": "A CPU",
    "isa": "avx2",
    "fastlm": "0.1",
    "torch": "2",
    "python": "3",
    "system": "Linux",
    "peaks": {
        "2": {
            "read_bytes_per_second": 2e10,
            "float32_flops_per_second": 2e11,
            "float32_product_flops_per_second": 1.8e11,
        }
    },
}


def row(direction, ratio, **other):
    baselines = other.pop(
        "baselines", {"eager": Baseline(2e-3, Ratio(ratio, ratio - 0.1, ratio + 0.1), bytes=4_000_000)}
    )
    return Row(
        "linear",
        "1 × 2",
        "float32",
        2,
        direction,
        "cpu",
        1e-3,
        baselines,
        share=0.5,
        bound="memory",
        work=Work(1e6, 1e5),
        bytes_held=2_000_000,
        **other,
    )


OPERATORS = [row("forward", 1.2), row("backward", 1.3)]
STEP = Row(
    "training_step",
    "GPT-2",
    "float32",
    2,
    "step",
    "cpu, torch",
    0.5,
    {
        "eager": Baseline(1.0, Ratio(2.0, 1.9, 2.1), 4_000_000),
        "eager tuned": Baseline(0.75, Ratio(1.5, 1.4, 1.6), 5_000_000),
    },
    share=0.8,
    bound="arithmetic",
    bytes_held=2_000_000,
    tokens=1024,
    recompute=2,
)


def test_markdown_has_a_row_per_operator_dtype_and_threads():
    text = report.markdown([*OPERATORS, STEP], DESCRIBED)
    assert "- 2 threads: reads 20.0 GB/s; multiply-adds 200 GFLOP/s in float32, of which PyTorch's matrix" in text
    assert "| `linear` | float32 | 2 | 1.20 [1.10–1.30] | 1.30 [1.20–1.40] | – | 50% / 50% | – | – | cpu |" in text
    assert "| 1.40 [1.30–1.50] | 50% / 50% | 0.50 | 0.75 | cpu |" in report.markdown(
        [*OPERATORS, row("forward+backward", 1.4, error=0.75)], DESCRIBED
    )
    assert (
        "| dtype | threads | recompute | fastlm | share of peak | speedup over eager | speedup over eager tuned "
        "| memory | relative to eager |" in text
    )
    assert "| float32 | 2 | 2 | 2,048.0 tokens/s | 80% | 2.00 [1.90–2.10] | 1.50 [1.40–1.60] | 2 MB | 0.50 |" in text


def test_the_fastest_baseline_is_reported():
    both = {"eager": Baseline(2e-3, Ratio(2.0, 1.9, 2.1)), "compiled": Baseline(1.5e-3, Ratio(1.5, 1.4, 1.6))}
    best = row("forward", 0, baselines=both)
    assert best.best_baseline == "compiled" and best.as_dict()["best_baseline"] == "compiled"
    assert "| 1.50 [1.40–1.60] (compiled) |" in report.markdown([best], DESCRIBED)


def test_the_screen_fits_80_columns_and_shows_every_baseline():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    for table in screen_tables([*OPERATORS, STEP]):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    words = (
        "linear: 1 × 2|forward|backward|1.20 [1.10–1.30]|50%|1 ms|eager|2,048/s|1.50 [1.40–1.60]|80%|0.50"
        "|eager tuned|by cpu, torch|level"
    ).split("|")
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("seconds, words", [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.5e-5, "45 µs")])
def test_seconds_in_words(seconds, words):
    assert seconds_in_words(seconds) == words


BARE = dataclasses.replace(OPERATORS[0], work=None, bytes_held=None)
PICTURES = {"all": [*OPERATORS, STEP], "steps": [STEP], "one": OPERATORS[:1], "without memory and FLOPs": [BARE]}


@pytest.mark.parametrize("rows", PICTURES.values(), ids=PICTURES)
def test_the_picture_is_drawn_for_any_rows(tmp_path, rows):
    pytest.importorskip("matplotlib")
    plots.draw(tmp_path / "plot.png", plots.figure_of(rows, DESCRIBED))
    check_drawn(tmp_path / "plot.png")
    check_picture(plots.figure_of(rows, DESCRIBED))


def test_an_operator_has_one_name_in_a_picture():
    pytest.importorskip("matplotlib")
    rows = [dataclasses.replace(row, operator="attention_varlen") for row in OPERATORS]
    figure = plots.figure_of(rows, DESCRIBED)
    names = {
        tick.get_text().partition(",")[0]
        for axes in figure.axes
        if axes.get_title() in ("speedup", "peak memory")
        for tick in axes.get_yticklabels()
    }
    assert names == {"attention_varlen"} and figure.axes[-1].get_title() == "peak memory"


def check_picture(figure):
    """Every panel has data, no legend covers any, and the text after a bar does not touch the frame."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.has_data()
        for text in axes.texts:
            assert text.get_window_extent().x1 + 4 < axes.bbox.x1, text
        if legend := axes.get_legend():
            place = legend.get_window_extent()
            assert legend.get_texts() and not any(place.overlaps(other.bbox) for other in figure.axes)
            assert not any(place.overlaps(label.get_window_extent()) for label in (axes.xaxis.label, axes.yaxis.label))
