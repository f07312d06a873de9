import os

import pytest

from fastlm.training.estimate import Estimate, Seconds
from fastlm.training.run_time import Disk, disk_at, run_time, seconds_since_start
from fastlm.training.settings import Settings

FOUND = Estimate(
    parameters=50,
    seconds=Seconds(start=1.0, step=2.0, evaluation=3.0, copy=0.5),
    memory=0,
    available=0,
    stored=600,
    measured=True,
)
DISK = Disk(seconds=0.01, busy=0.005)


def test_the_parts_of_a_run():
    """Of 10 steps: three evaluations and four checkpoints, each the last time at the end, where the run waits."""
    found = run_time(Settings(steps=10, eval_every=4, checkpoint_every=3), FOUND, 4.0, DISK)
    assert (found.start, found.steps, found.evaluations, found.evaluating) == (5, 20, 3, 9)
    assert (found.checkpoints, found.saving) == (4, pytest.approx(4 * 0.5 + 3 * 3 + 6 + 2))
    assert found.total == pytest.approx(53)


@pytest.mark.parametrize("every, count", [(0, 1), (20, 1), (10, 1), (9, 2)])
def test_one_checkpoint_at_least(every, count):
    assert run_time(Settings(steps=10, checkpoint_every=every), FOUND, 0.0, DISK).checkpoints == count


def test_measuring_the_disk_leaves_nothing(tmp_path):
    found = disk_at(tmp_path, 100_000)
    assert 0 < found.busy <= found.seconds < 1e-3
    assert not os.listdir(tmp_path)
    assert disk_at(tmp_path / "none", 100) == Disk(0.0, 0.0)


def test_the_start_of_this_process():
    assert 0 <= seconds_since_start() < 86400
