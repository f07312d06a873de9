import sys

import pytest

from fastlm.training.curve import draw_losses, smoothed


def test_smoothing_keeps_a_line_and_is_not_late():
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    line = [float(i) for i in range(200)]
    assert smoothed(line) == pytest.approx(line)
    step = smoothed([1.0] * 100 + [0.0] * 100)
    assert (
        step[:97] == pytest.approx([1.0] * 97)
        and step[103:] == pytest.approx([0.0] * 97, abs=1e-9)
        and 0.4 < step[99] + step[100] - 0.5 < 0.6
    )
    noisy = smoothed([1.0, -1.0] * 100)
    assert max(map(abs, noisy[10:-10])) < 0.2
    assert smoothed([2.0]) == [2.0]


def test_the_picture_is_drawn(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    assert draw_losses(tmp_path / "loss.png", [3.0, 2.0, 1.5], validation=[(3, 1.6)], plain=[3.0, 2.0])
    pixels = image.imread(tmp_path / "loss.png")
    assert pixels.shape[:2] == (540, 960)
    assert (
        len({tuple(p) for p in pixels[::5, ::5].reshape(-1, pixels.shape[2]).round(1).tolist()}) > 5
    )  # lines in several colours, not an empty page


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_losses(tmp_path / "loss.png", [1.0])
    assert not list(tmp_path.iterdir())
