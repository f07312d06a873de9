import json
import re

import pytest

from tests.commands.support import TEXT, fastlm_command, run
from tests.support import check_drawn


def test_eval_of_a_language_model(trained, text_file, tmp_path):
    """With windows side by side, as in training, the loss is that of training."""
    out, _ = trained
    (tmp_path / "val.txt").write_bytes(TEXT.encode()[round(0.9 * len(TEXT.encode())) :])
    output = run("eval", "--model", out, tmp_path / "val.txt", "--stride", 16, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert f"loss {scores['loss']:.4f} nats per token\n" in output
    assert f"perplexity {scores['perplexity']:.2f}\nbits per byte {scores['bits_per_byte']:.4f}\n" in output
    assert scores["bytes"] == scores["tokens"] + 1
    val_loss = json.loads((out / "summary.json").read_text())["val_loss"]
    assert scores["loss"] == pytest.approx(val_loss, abs=0.02)
    closer = run("eval", "--model", out, tmp_path / "val.txt", "--stride", 1)
    loss = float(re.search(r"loss (\S+)", closer)[1])
    assert loss != scores["loss"] and loss == pytest.approx(scores["loss"], abs=0.1)


def test_eval_of_a_masked_model(trained_bert, text_file):
    output = run("eval", "--model", trained_bert[0], text_file)
    accuracy = float(re.search(r"masked accuracy (\S+) %", output)[1])
    assert 5 < accuracy < 100 and output == run("eval", "--model", trained_bert[0], text_file)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("latin.txt", [], "data: expected UTF-8 text, got .*latin.txt, invalid at byte 1"),
        ("none.txt", [], "data: expected a file, a directory .*, got '.*none.txt'"),
        ("text.txt", ["--context", 17], "context: expected at most 16, the context of the model, got 17"),
    ],
)
def test_errors(trained, tmp_path, name, arguments, message):
    (tmp_path / "latin.txt").write_bytes(b"a\xe9b" * 20)
    (tmp_path / "text.txt").write_text(TEXT)
    result = fastlm_command("eval", "--model", trained[0], tmp_path / name, *arguments)
    assert result.exit_code == 1 and re.fullmatch(f"error: {message}\n", result.stderr), result.stderr


@pytest.mark.parametrize(
    "arguments, name",
    [(["eval", "text.txt", "--model", "nomodel", "--json"], "json"), (["plot", "norun", "--out"], "out")],
)
def test_a_file_that_cannot_be_written_is_an_error_before_anything_is_read(arguments, name):
    result = fastlm_command(*arguments, "nodir/x.png")
    message = f"error: {name}: expected a file name in an existing directory, got 'nodir/x.png'\n"
    assert result.exit_code == 1 and result.stderr == message


def test_plot(trained, tmp_path):
    output = run("plot", trained[0], "--out", tmp_path / "run.png", "--out", tmp_path / "run.html")
    assert output == f"1 run plotted in {tmp_path / 'run.png'}\n1 run plotted in {tmp_path / 'run.html'}\n"
    check_drawn(tmp_path / "run.png")
