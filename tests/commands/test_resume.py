import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time

import pytest
import tokenizers

from fastlm import cli
from fastlm.models import CausalLM, LlamaConfig
from fastlm.training import loop
from fastlm.training.checkpoints import Checkpoints, locked_run, saved_in, sha256
from tests.commands.support import TEXT, TINY, assert_same_run, fastlm_command, process, run

SETTINGS = [*TINY, "--steps", 16, "--dropout", 0.1, "--checkpoint-every", 4, "--threads", 1]


@pytest.fixture(scope="module")
def whole(text_file, tmp_path_factory):
    """A run that nothing has interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run("train", text_file, *SETTINGS, "--out", out)
    return out


def interrupt(monkeypatch, *arguments, at):
    """Trains until a checkpoint cannot be written; `at`: its step."""
    write = Checkpoints.write

    def fail(self, step, *rest):
        if step == at:
            raise OSError("interrupted")
        write(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "write", fail)
        assert fastlm_command("train", *arguments).exit_code == 1


@pytest.fixture
def interrupted(text_file, tmp_path, monkeypatch):
    """A run with checkpoints of steps 4 and 8 of 16, and its text."""
    text = tmp_path / "text.txt"
    shutil.copy(text_file, text)
    interrupt(monkeypatch, text, *SETTINGS, "--out", tmp_path / "out", at=12)
    written = ["checkpoints", "config.toml", "metrics.jsonl", "run.json", "tokens"]
    assert sorted(os.listdir(tmp_path / "out")) == written
    return tmp_path / "out", text


def metrics_of(out):
    """Without what depends on the time."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in records]


def assert_same_weights(out, other):
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def assert_error(result, message):
    assert result.exit_code == 1 and re.fullmatch(f"error: {message}\n", result.stderr), result.stderr


def test_resume_needs_no_other_option(interrupted, whole, tmp_path, monkeypatch):
    monkeypatch.chdir("/")  # and no other directory
    out, _ = interrupted
    assert metrics_of(out)[-1]["step"] > 8  # of steps that are run again
    assert "resumed after 8 steps of 16\n" in run("train", "--resume", out)
    assert_same_weights(out, whole)
    assert metrics_of(out) == metrics_of(whole)
    assert [x["step"] for x in metrics_of(out) if "loss" in x] == list(range(1, 17))
    moved = out.rename(tmp_path / "moved")
    before = (moved / "summary.json").read_bytes()
    assert "resumed after 16 steps of 16\n" in run("train", "--resume", moved)  # it is complete
    assert_same_weights(moved, whole)
    assert (moved / "summary.json").read_bytes() == before


def test_resume_with_another_version(interrupted):
    out, _ = interrupted
    content = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(content | {"versions": {"fastlm": "0.0", "torch": "1.0"}}))
    output = run("train", "--resume", out)
    assert re.search("^started with fastlm 0.0, torch 1.0; with fastlm .*, results may differ by round", output)


def test_resume_before_the_first_checkpoint(text_file, whole, tmp_path, monkeypatch):
    interrupt(monkeypatch, text_file, *SETTINGS, "--out", tmp_path / "out", at=4)
    assert "resumed after 0 steps of 16\n" in run("train", "--resume", tmp_path / "out")
    assert_same_run(tmp_path / "out", whole)


def test_resume_with_masked_tokens_and_a_validation_file(text_file, tmp_path, monkeypatch):
    (tmp_path / "val.txt").write_text(TEXT[:500])
    given = [text_file, *SETTINGS, "--objective", "masked-token", "--tokenizer", "char", "--dtype", "bf16"]
    given += ["--val-file", tmp_path / "val.txt", "--recompute", 2]
    run("train", *given, "--out", tmp_path / "whole")
    interrupt(monkeypatch, *given, "--out", tmp_path / "out", at=8)
    run("train", "--resume", tmp_path / "out")
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("at", [4, 8])
def test_resume_a_run_that_started_from_a_model(text_file, tmp_path, monkeypatch, at):
    """Once there is a checkpoint, the model that it started from is not needed."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=270)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    CausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "llama")
    tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    (tmp_path / "llama" / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    given = [text_file, "--init", tmp_path / "llama", "--context", 16, "--steps", 12, "--checkpoint-every", 4]
    run("train", *given, "--threads", 1, "--out", tmp_path / "whole")
    interrupt(monkeypatch, *given, "--threads", 1, "--out", tmp_path / "out", at=at)
    if at == 8:
        shutil.rmtree(tmp_path / "llama")
    run("train", "--resume", tmp_path / "out")
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("at", [4, 12])
def test_resume_a_run_with_adapters(text_file, tmp_path, monkeypatch, at):
    """Before the first checkpoint and after two. The model to start from is read again and has to be the same."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=270)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    CausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "llama")
    tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    given = [text_file, "--init", tmp_path / "llama", "--context", 16, "--steps", 14, "--checkpoint-every", 4]
    given += ["--lora", 4, "--dropout", 0.1, "--ema", 0.9, "--threads", 1]
    run("train", *given, "--out", tmp_path / "whole")
    interrupt(monkeypatch, *given, "--out", tmp_path / "out", at=at)
    weights = tmp_path / "llama" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\0")
    message = f"init: expected the file {weights} as the run was started with, got a changed one"
    assert_error(fastlm_command("train", "--resume", tmp_path / "out"), message)
    weights.write_bytes(content)
    run("train", "--resume", tmp_path / "out")
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    assert metrics_of(tmp_path / "out") == metrics_of(tmp_path / "whole")


def test_a_damaged_checkpoint_is_skipped_and_named(interrupted, whole):
    out, _ = interrupted
    damaged = out / "checkpoints" / "step-00000008" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    output = run("train", "--resume", out)
    assert f"skipped a damaged checkpoint: {damaged}, which has changed\nresumed after 4 steps of 16\n" in output
    assert_same_weights(out, whole)
    for folder in saved_in(out):  # the damaged one was replaced
        for line in (folder / "SHA256SUMS").read_text().splitlines():
            digest, name = line.split("  ")
            assert sha256(folder / name) == digest


def test_a_damaged_checkpoint_does_not_count_among_those_kept(interrupted):
    out, _ = interrupted
    later = shutil.copytree(out / "checkpoints" / "step-00000008", out / "checkpoints" / "step-00000099")
    (later / "training.json").unlink()
    run("train", "--resume", out)
    assert [folder.name for folder in saved_in(out)] == ["step-00000012", "step-00000016"]


def change_format(file):
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 9, "versions": {"fastlm": "9.0"}}))


def test_resume_errors(interrupted, tmp_path):
    out, text = interrupted
    newest = out / "checkpoints" / "step-00000008"
    (tmp_path / "empty").mkdir()
    message = f"resume: expected the directory of a run, with run.json, got '{tmp_path}/empty'"
    assert_error(fastlm_command("train", "--resume", tmp_path / "empty"), message)
    message = "resume: expected no other option than --device, --threads and --parallel, got "
    assert_error(fastlm_command("train", "--resume", out, "--eval-every", 20), message + "--eval-every")
    assert_error(fastlm_command("train", "--resume", out, text), message + "PATH")
    with locked_run(out):
        message = f"out: expected a run that no other process trains, got '{out}'"
        assert_error(fastlm_command("train", "--resume", out), message)
    text.write_text(TEXT.replace("for", "far", 1))
    message = f"data: expected the file {text} as the run was started with, got a changed one"
    assert_error(fastlm_command("train", "--resume", out), message)
    text.unlink()
    message = f"data: expected the file {text}, which the run was started with, got none"
    assert_error(fastlm_command("train", "--resume", out), message)
    change_format(newest / "training.json")
    sums = (newest / "SHA256SUMS").read_text().splitlines()
    digest = sha256(newest / "training.json")
    sums = [f"{digest}  training.json" if line.endswith("training.json") else line for line in sums]
    (newest / "SHA256SUMS").write_text("\n".join(sums))
    message = f"resume: expected format 3, got format 9 in {newest}/training.json, written by fastlm 9.0"
    assert_error(fastlm_command("train", "--resume", out), message)
    change_format(out / "run.json")
    message = f"resume: expected format 3, got format 9 in {out}/run.json, written by fastlm 9.0"
    assert_error(fastlm_command("train", "--resume", out), message)
    for damage in ('{"format": 3}', '{"format": 3, ', "{}", "[]"):
        (out / "run.json").write_text(damage)
        assert_error(fastlm_command("train", "--resume", out), f".*{out}/run.json.*")


def test_checkpoints_are_not_overwritten(interrupted, monkeypatch):
    out, text = interrupted
    message = (
        f"out: expected a directory without a model, got '{out}', which has checkpoints/step-00000004; "
        "--overwrite replaces it, --resume continues it"
    )
    assert_error(fastlm_command("train", text, *SETTINGS, "--out", out), message)
    assert len(saved_in(out)) == 2
    interrupt(monkeypatch, text, *SETTINGS, "--out", out, "--overwrite", at=4)
    assert not saved_in(out)  # the new run does not go on from those of the earlier one


def test_a_disk_that_fills_up_does_not_lose_the_run(interrupted, whole):
    out, _ = interrupted
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # write() fails, as on a full disk
    try:
        result = fastlm_command("train", "--resume", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_error(result, rf"out: could not save the checkpoint '{out}/checkpoints/step-00000012': .*")
    assert [folder.name for folder in (out / "checkpoints").iterdir() if "8" in folder.name]
    assert not list((out / "checkpoints").glob(".*"))
    run("train", "--resume", out)
    assert_same_weights(out, whole)


def test_the_model_is_saved_if_the_last_checkpoint_does_not_fit(text_file, whole, tmp_path, monkeypatch):
    interrupt(monkeypatch, text_file, *SETTINGS, "--out", tmp_path / "out", at=16)
    assert [folder.name for folder in saved_in(tmp_path / "out")] == ["step-00000008", "step-00000012"]
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written(interrupted):
    out, _ = interrupted
    out.chmod(0o500)
    try:
        assert_error(fastlm_command("train", "--resume", out), f"resume: expected a writable directory, got '{out}'.*")
    finally:
        out.chmod(0o700)


@pytest.mark.parametrize("at, hint", [(6, "to go on: fastlm train --resume {out}\n"), (1, "")])
def test_a_second_interrupt_prints_the_command_that_goes_on(text_file, whole, tmp_path, monkeypatch, at, hint):
    """The second signal comes before the step has ended; the first step of a run has no checkpoint."""
    out, calls, training_batch = tmp_path / "out", [], loop.training_batch

    def interrupting(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            if at == 1:
                raise KeyboardInterrupt
        return training_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_batch", interrupting)
        result = fastlm_command("train", text_file, *SETTINGS, "--out", out)
    assert result.exit_code == 130 and result.stderr == "interrupted\n"
    assert result.stdout.endswith(hint.format(out=out)) and ("to go on" in result.stdout) == bool(hint)
    run("train", "--resume", out)
    assert_same_weights(out, whole)


def test_ctrl_c_is_ignored_once_everything_is_saved(text_file, tmp_path, monkeypatch):
    """While Python shuts down, it would end the process by the signal."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["fastlm", "--version"])
    try:
        run("train", text_file, *TINY, "--steps", 1, "--out", tmp_path / "out")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, before)
        with pytest.raises(SystemExit):
            cli.main()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(running, condition, deadline=120):
    end = time.monotonic() + deadline
    while not condition():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < end
        time.sleep(0.0005)


@pytest.mark.nightly
def test_killed_at_twenty_moments(text_file, tmp_path):
    """Half of them while a checkpoint is written, half at any time."""
    settings = [*TINY, "--dropout", 0.1, "--threads", 1, "--eval-every", 10**6, "--checkpoint-every", 5]
    given = ["train", text_file, *settings, "--steps", 4000, "--keep", 2]
    run(*given, "--out", tmp_path / "whole")
    out, moments, partial = tmp_path / "out", random.Random(0), 0
    for kill in range(20):
        command = ["train", "--resume", "out"] if (out / "run.json").is_file() else [*given, "--out", "out"]
        before = saved_in(out)
        with process(*command, cwd=tmp_path) as running:
            wait_for(running, lambda: saved_in(out)[-1:] != before[-1:])  # noqa: B023
            time.sleep(moments.uniform(0, 0.2))
            if kill % 2:
                wait_for(running, lambda: list(out.glob("checkpoints/.partial-step-*")))
            running.send_signal(signal.SIGKILL)
        assert running.returncode == -signal.SIGKILL
        partial += bool(list(out.glob("checkpoints/.partial-step-*")))
    assert partial >= 3
    assert "resumed after" in run("train", "--resume", out)
    assert_same_weights(out, tmp_path / "whole")
    assert metrics_of(out) == metrics_of(tmp_path / "whole")
