import os

import pytest
import torch

from fastlm.training import distributed
from fastlm.training.batches import filled, share_of
from fastlm.training.data.order import dropout_seed
from fastlm.training.distributed import Group
from fastlm.training.parallel import check_parallel


class Member(Group):
    """One of several processes, without the others."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("count, size", [(7, 2), (7, 4), (8, 4), (3, 3), (2, 4)])
def test_shares_are_all_places_once(count, size):
    shares = [Member(rank, size).share(count) for rank in range(size)]
    assert [place for share in shares for place in share] == list(range(count))
    assert max(map(len, shares)) == Member(0, size).largest_share(count)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("count, size", [(7, 2), (7, 4), (2, 4)])
def test_all_processes_run_as_many_sequences(count, size):
    """Targets count once; what fills up a share has none."""
    inputs = torch.arange(count)[:, None].expand(count, 3)
    parts = [share_of(Member(rank, size), (inputs, inputs)) for rank in range(size)]
    assert {len(x) for part in parts for x in part} == {Member(0, size).largest_share(count)}
    targets = torch.cat([targets for _, targets in parts])
    assert torch.equal(targets[targets[:, 0] >= 0], inputs)


def test_one_process_has_the_batch_itself():
    pair = torch.zeros(3, 4), torch.ones(3, 4)
    assert filled(Group(), 3, pair) is pair
    assert all(torch.equal(a, b) for a, b in zip(share_of(Group(), pair), pair, strict=True))
    assert Group().total(1, 2.5, True) == [1, 2.5, True] and Group().any(False) is False
    assert Group.current().size == 1


@pytest.mark.parametrize("given, expected", [(None, "half"), ("1", "half"), ("3", None)])
def test_threads_of_a_process(monkeypatch, given, expected):
    """torchrun sets OMP_NUM_THREADS to 1 if the user has not set it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    half = max(1, len(os.sched_getaffinity(0)) // 2)
    assert distributed.local_threads() == (half if expected else None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.local_threads() is None


def test_each_process_has_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.local_device(torch.device("cuda")) == torch.device("cuda:1")
    assert distributed.local_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    message = "device: expected at most as many processes on a machine as GPUs, 2, or --device cpu, got process 3"
    with pytest.raises(ValueError, match=message):
        distributed.local_device(torch.device("cuda"))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon", "inf"])
def test_invalid_timeouts(monkeypatch, value):
    monkeypatch.setenv("FASTLM_TIMEOUT", value)
    with pytest.raises(ValueError, match=f"FASTLM_TIMEOUT: expected a number of seconds above 0, got '{value}'"):
        distributed.timeout()


def test_the_environment_has_numbers(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE: expected an integer, got 'many'"):
        distributed.process_count()


def test_only_errors_of_connections_are_those_of_other_processes():
    lost = RuntimeError("[/gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1. This may be a bug.")
    assert distributed.lost_process(lost) == "Connection closed by peer [127.0.0.1]:1"
    assert distributed.lost_process(RuntimeError("shapes do not match")) is None


def test_dropout_differs_between_steps_and_processes():
    seeds = {dropout_seed(seed, step, rank) for seed in range(3) for step in range(5) for rank in range(4)}
    assert len(seeds) == 60 and all(0 <= seed < 2**63 for seed in seeds)


def test_what_does_not_fit_the_processes_is_an_error():
    check_parallel(Group(), batch=1)
    with pytest.raises(ValueError, match="batch: expected at least 4, the number of processes, got 3"):
        check_parallel(Member(0, 4), batch=3)
