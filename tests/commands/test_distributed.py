"""fastlm train in two processes over gloo: signals, killed processes, torchrun."""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file

from fastlm.models import CausalLM, LlamaConfig, load_model
from fastlm.training.checkpoints import saved_in
from tests.commands.support import TEXT, TINY, fastlm_command
from tests.training import processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is tested on Linux")
SETTINGS = [*TINY, "--steps", 80, "--dropout", 0.1, "--checkpoint-every", 10, "--eval-every", 10**6, "--batch", 3]
LOST = r"error: process \d of 2: another process has ended, or has not answered for 20 seconds \([^\n]*\)\n"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The command line of a run."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return ["-m", "fastlm.cli", "train", file, *SETTINGS]


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """A run of two processes that nothing has interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    (_, output, _), (_, silent, _) = processes.run(2, *given, "--out", out, cwd=out.parent)
    assert "1 thread in each of 2 processes (ddp)\n" in output and silent == ""
    return out


def weights_of(out):
    return (out / "model.safetensors").read_bytes()


def wait_for(condition, running, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in running), processes.finished(running)
        assert time.monotonic() < end
        time.sleep(0.001)


def disturbed(out, command, number, rank, moment=0.0, while_writing=False):
    """Runs the command in two processes and signals one of them after a new checkpoint."""
    before = saved_in(out)
    with processes.started(2, *command, cwd=out.parent) as running:
        wait_for(lambda: saved_in(out)[-1:] != before[-1:], running)
        time.sleep(moment)
        if while_writing:
            wait_for(lambda: list(out.glob("checkpoints/.partial-step-*")), running)
        running[rank].send_signal(number)
        return processes.finished(running, 60)


def go_on(given, out):
    resume = ["-m", "fastlm.cli", "train", "--resume", out]
    return resume if (out / "run.json").is_file() else [*given, "--out", out]


def test_killed_and_stopped_runs_go_on_to_the_same_bits(given, whole, tmp_path):
    out = tmp_path / "out"
    results = disturbed(out, go_on(given, out), signal.SIGKILL, rank=1)
    assert [code for code, *_ in results] == [1, -signal.SIGKILL]
    assert re.fullmatch(LOST, results[0][2]), results
    results = disturbed(out, go_on(given, out), signal.SIGTERM, rank=1, moment=0.05)
    assert [code for code, *_ in results] == [0, 0] and results[0][2] == results[1][2] == "", results
    steps = int(re.search(r"interrupted after (\d+) steps", results[0][1])[1])
    assert saved_in(out)[-1].name == f"step-{steps:08}" and steps < 80
    results = processes.run(2, *go_on(given, out), cwd=tmp_path)
    assert f"resumed after {steps} steps of 80\n" in results[0][1]
    assert weights_of(out) == weights_of(whole)


@pytest.mark.nightly
@pytest.mark.parametrize("kind, steps", [("ddp", 1500), ("fsdp", 1000)])
def test_killed_at_twenty_moments(given, tmp_path, kind, steps):
    """Half of them while a checkpoint is written; one or the other process."""
    given = [*given, "--parallel", kind, "--steps", steps]
    processes.run(2, *given, "--out", tmp_path / "whole", cwd=tmp_path, seconds=600)
    out, moments = tmp_path / "out", random.Random(0)
    for kill in range(20):
        rank = moments.randrange(2)
        moment = moments.uniform(0, 0.2)
        results = disturbed(out, go_on(given, out), signal.SIGKILL, rank, moment, while_writing=kill % 2 == 1)
        assert results[rank][0] == -signal.SIGKILL and results[1 - rank][0] == 1
        assert "Traceback" not in results[1 - rank][2]
    processes.run(2, *go_on(given, out), cwd=tmp_path, seconds=600)
    assert weights_of(out) == weights_of(tmp_path / "whole")


@pytest.mark.slow
def test_torchrun_restarts_a_run_from_its_newest_checkpoint(given, whole, tmp_path):
    """By itself, with the command that started the run."""
    out = tmp_path / "out"
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1]
    with processes.started(1, *agent, *given, "--out", out, cwd=tmp_path) as running:
        wait_for(lambda: saved_in(out), running)
        os.kill(max(children(running[0].pid)), signal.SIGKILL)
        ((code, output, errors),) = processes.finished(running, 90)
    assert code == 0, errors
    assert re.search(r"resumed after \d+0 steps of 80\n", output)
    assert weights_of(out) == weights_of(whole)


def children(parent):
    """The processes that train."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and b"fastlm.cli" in command:
            found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_a_process_that_does_not_answer_ends_the_run(given, tmp_path):
    out = tmp_path / "out"
    command = [*given, "--out", out]
    with processes.started(2, *command, cwd=tmp_path, FASTLM_TIMEOUT="3") as running:
        wait_for(lambda: saved_in(out), running)
        running[1].send_signal(signal.SIGSTOP)
        code, _, errors = processes.finished(running[:1], 30)[0]
    assert code == 1 and re.fullmatch(LOST.replace("20", "3"), errors), errors


@pytest.mark.nightly
def test_adapters(tmp_path):
    """In two processes; --resume in one."""
    pytest.importorskip("peft", reason="pip install 'fastlm[test]'")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=270)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    CausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "llama")
    tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT)
    given = ["train", "text.txt", "--init", "llama", "--context", 16, "--steps", 10, "--batch", 4, "--lora", 4]
    given = ["-m", "fastlm.cli", *given, "--checkpoint-every", 4, "--warmup", 2]
    processes.run(1, *given, "--out", "one", cwd=tmp_path)
    processes.run(2, *given, "--out", "two", cwd=tmp_path)
    losses = []
    for out in ("one", "two"):
        records = map(json.loads, (tmp_path / out / "metrics.jsonl").read_text().splitlines())
        losses.append([record["loss"] for record in records if "loss" in record])
    assert len(losses[0]) == 10 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000010")
    output = processes.run(1, "-m", "fastlm.cli", "train", "--resume", "two", cwd=tmp_path)[0][1]
    assert "resumed after 8 steps of 10\n" in output
    sampled = [*given, "--parallel", "fsdp", "--sample-every", 5, "--out", "three"]
    assert "step 5: sample " in processes.run(2, *sampled, cwd=tmp_path)[0][1]
    one, three = (load_model(tmp_path / out).state_dict() for out in ("one", "three"))
    for name, x in three.items():
        torch.testing.assert_close(x, one[name], rtol=0, atol=1e-4)
    one, three = (load_file(tmp_path / out / "adapter" / "adapter_model.safetensors") for out in ("one", "three"))
    for name, x in three.items():
        torch.testing.assert_close(x, one[name], rtol=0, atol=1e-4)
    shutil.rmtree(tmp_path / "three" / "checkpoints" / "step-00000010")
    output = processes.run(1, "-m", "fastlm.cli", "train", "--resume", "three", cwd=tmp_path)[0][1]
    assert "resumed after 8 steps of 10\n" in output


@pytest.mark.slow
def test_resume_with_another_way_to_divide_the_model(given, whole, tmp_path):
    out = tmp_path / "out"
    disturbed(out, [*given, "--parallel", "fsdp", "--out", out], signal.SIGTERM, rank=0)
    assert (saved_in(out)[-1] / ".metadata").is_file()
    results = processes.run(2, "-m", "fastlm.cli", "train", "--resume", out, "--parallel", "ddp", cwd=tmp_path)
    assert "processes (ddp)\n" in results[0][1]
    assert (saved_in(out)[-1] / "training.safetensors").is_file()
    found, expected = load_model(out).state_dict(), load_model(whole).state_dict()
    for name, x in found.items():  # 80 steps of lr 1e-3 with the same dropout
        torch.testing.assert_close(x, expected[name], rtol=0, atol=2e-3)


@pytest.mark.slow
def test_an_error_is_reported_once(given, tmp_path):
    with processes.started(2, *given, "--batch", 1, "--out", tmp_path / "out", cwd=tmp_path) as running:
        results = processes.finished(running)
    assert [code for code, *_ in results] == [1, 1]
    assert [errors for *_, errors in results] == [
        "error: batch: expected at least 2, the number of processes, got 1\n",
        "",
    ]
    assert not os.listdir(tmp_path)


def test_other_commands_run_in_one_process(tmp_path, monkeypatch):
    """As torchrun starts them: each would write into the same directory."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = fastlm_command("demo", "--out", tmp_path / "out")
    assert result.exit_code == 1 and result.stderr == (
        "error: WORLD_SIZE: expected 1, as only `fastlm train` runs on several processes, got '2'\n"
    )
    assert not os.listdir(tmp_path)
