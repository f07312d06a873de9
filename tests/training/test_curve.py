import sys

import pytest

from fastlm.training.curve import draw_losses, smoothed


def test_smoothing_keeps_lines_and_has_no_delay():
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
    assert max(map(abs, noisy[10:])) < 0.2
    assert smoothed([2.0]) == [2.0]


def test_plot(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    assert draw_losses(tmp_path / "loss.png", [3.0, 2.0, 1.5], validation=[(3, 1.6)], plain=[3.0, 2.0])
    pixels = image.imread(tmp_path / "loss.png")
    assert pixels.shape[:2] == (540, 960)
    colours = {tuple(p) for p in pixels[::5, ::5].reshape(-1, pixels.shape[2]).round(1).tolist()}
    assert len(colours) > 5  # not an empty page


def test_no_file_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_losses(tmp_path / "loss.png", [1.0])
    assert not list(tmp_path.iterdir())
