import sys

import pytest

from fastlm.training.curve import draw_losses, smoothed


def test_smoothing_keeps_a_constant_and_follows_a_step():
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    after = smoothed([1.0] * 100 + [0.0] * 100)
    assert after[99] == pytest.approx(1.0) and after[-1] < 0.01
    assert smoothed([2.0]) == [2.0]


def test_the_picture_is_drawn(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    assert draw_losses(tmp_path / "loss.png", [3.0, 2.0, 1.5], validation=[(3, 1.6)], plain=[3.0, 2.0])
    pixels = image.imread(tmp_path / "loss.png")
    assert pixels.shape[:2] == (540, 960)
    assert len({tuple(p) for p in pixels[::5, ::5].reshape(-1, pixels.shape[2]).round(1).tolist()}) > 5  # lines in several colours, not an empty page


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_losses(tmp_path / "loss.png", [1.0])
    assert not list(tmp_path.iterdir())
