import pytest

from fastlm.benchmarking import plots, report, whole
from fastlm.benchmarking.compare import Baseline, Row
from fastlm.benchmarking.measure import Ratio
from fastlm.commands.bench_screen import screen_tables
from fastlm.training import bench as growth
from fastlm.training.bench import Subject
from tests.benchmarks.test_report import DESCRIBED, OPERATORS, check_picture
from tests.support import check_drawn

BASELINES = {
    "eager": Baseline(1.0, Ratio(2.0, 1.9, 2.1), 4_000_000),
    "eager tuned": Baseline(0.75, Ratio(1.5, 1.4, 1.6), 5_000_000),
}


def row(point, seconds):
    shape = growth.SHAPES[growth.series_of(point)]
    tokens = growth.POINTS[point].batch * growth.POINTS[point].context
    return Row(
        "growth",
        shape,
        "float32",
        2,
        point,
        "cpu",
        seconds,
        BASELINES,
        share=0.5,
        bound="arithmetic",
        bytes_held=2_000_000,
        tokens=tokens,
        recompute=1,
    )


ROWS = [row(point, 0.1 * (i + 1)) for i, point in enumerate(growth.POINTS)]


@pytest.mark.parametrize("series", growth.SERIES)
def test_only_the_size_differs_along_a_series(series):
    subjects = growth.SERIES[series]
    assert len({subject.batch * subject.context for subject in subjects.values()}) == 1
    assert (
        len(
            {
                (subject.kind, subject.layers, subject.vocabulary, subject.dropout, subject.width // subject.heads)
                for subject in subjects.values()
            }
        )
        == 1
    )
    assert [getattr(subject, series) for subject in subjects.values()] == [*subjects] == sorted(subjects)
    varied = {
        "context": {subject.width for subject in subjects.values()},
        "width": {subject.context for subject in subjects.values()},
    }
    assert len(varied[series]) == 1
    for subject in subjects.values():  # as the title of the table says
        assert f"{subject.layers} layers" in growth.SHAPES[series]


@pytest.mark.slow
def test_a_point_is_a_training_step_of_its_model(monkeypatch):
    monkeypatch.setitem(growth.POINTS, "context 128", Subject("GPT-2", 1, 32, 2, 50, 2, 16))
    found = whole.compare_growth("context 128", "float32", 1, rounds=5, budget=1.0)
    assert (found.operator, found.direction, found.tokens, found.shape) == (
        "growth",
        "context 128",
        32,
        growth.SHAPES["context"],
    )
    assert growth.series_of(found.direction) == "context" and growth.size_of(found.direction) == 128
    assert list(found.baselines) == ["eager", "eager tuned"] and found.seconds > 0


def test_every_size_has_its_line():
    text = report.markdown(ROWS, DESCRIBED)
    assert "| dtype | threads | size | fastlm |" in text
    assert all(f"| {point} |" in text for point in growth.POINTS)
    titles = [table.title for table in screen_tables(ROWS)]
    assert titles == [f"growth: {shape}" for shape in growth.SHAPES.values()]


@pytest.mark.parametrize(
    "rows",
    [ROWS, [*OPERATORS, *ROWS], ROWS[:1], [*OPERATORS, *ROWS[-1:]]],
    ids=["growth", "with others", "one point", "one series with others"],
)
def test_the_curves_are_drawn(tmp_path, rows):
    pytest.importorskip("matplotlib")
    plots.draw(tmp_path / "all.png", plots.figure_of(rows, DESCRIBED))
    check_drawn(tmp_path / "all.png")
    check_picture(plots.figure_of(rows, DESCRIBED))
