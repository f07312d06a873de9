"""The commands that read a trained model: generate and predict."""

import re

import pytest
import torch

from fastlm.generation import load_tokenizer
from fastlm.models import load_model
from tests.commands.support import TINY, fastlm_command, run


def test_generate_prints_the_generated_text(trained):
    out, _ = trained
    ids = load_tokenizer(out).encode("for ")
    expected = load_model(out).generate(torch.tensor([ids]), max_new_tokens=10, temperature=0.8, seed=3)[0].tolist()
    output = run("generate", "--model", out, "--prompt", "for ", "--max-new-tokens", 10, "--seed", 3)
    assert output == load_tokenizer(out).decode(expected) + "\n"
    assert output == run("generate", "--model", out, "--prompt", "for ", "--max-new-tokens", 10, "--seed", 3)
    assert output != run("generate", "--model", out, "--prompt", "for ", "--max-new-tokens", 10, "--seed", 4)


def test_generate_defaults_and_greedy_decoding(trained):
    out, _ = trained
    output = run("generate", "--model", out, "--prompt", "for ", "--temperature", 0)
    expected = load_model(out).generate(torch.tensor([load_tokenizer(out).encode("for ")]), max_new_tokens=200)
    assert expected.shape == (1, 204)  # beyond the context of 16
    assert output == load_tokenizer(out).decode(expected[0].tolist()) + "\n"


def test_generate_at_a_temperature_of_almost_0_is_greedy(trained):
    outputs = [
        run("generate", "--model", trained[0], "--prompt", "for ", "--max-new-tokens", 20, "--temperature", t)
        for t in (0, 1e-40, 5e-324)
    ]
    assert len(set(outputs)) == 1


def test_a_prompt_beyond_the_context_is_read_from_its_end(trained):
    prompt = "for line in lines: print("
    result = fastlm_command("generate", "--model", trained[0], "--prompt", prompt, "--temperature", 0)
    assert result.exit_code == 0 and result.stdout.startswith(prompt)
    assert result.stderr == "the prompt has 25 tokens; the model reads the last 16, its context\n"
    short = run("generate", "--model", trained[0], "--prompt", prompt[-16:], "--temperature", 0)
    assert result.stdout == prompt[:-16] + short


def test_streamer_holds_back_incomplete_characters(capsys):
    from fastlm.commands.streaming import TextStreamer
    from fastlm.generation import Tokenizer
    from fastlm.training.tokenizers import byte_tokenizer

    streamer, seen = TextStreamer(Tokenizer(byte_tokenizer(masked=False))), []
    for byte in "a€b".encode() + b"\xff":
        streamer.put(torch.tensor([byte]))
        seen.append(capsys.readouterr().out)
    streamer.end()
    assert seen == ["a", "", "", "€", "b", ""] and capsys.readouterr().out == "\ufffd\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", ""], "prompt: expected at least one token, got ''"),
        (["--prompt", "for", "--max-new-tokens", 0], "max_new_tokens: expected an integer >= 1, got 0"),
        (["--prompt", "for", "--temperature", -1], "temperature: expected a finite number >= 0, got -1.0"),
        (["--prompt", "for", "--top-k", 0], "top_k: expected an integer >= 1, got 0"),
        (["--prompt", "for", "--top-p", 1.5], r"top_p: expected a probability in \(0, 1\], got 1.5"),
        (["--prompt", "for", "--seed", -1], "seed: expected an integer >= 0, got -1"),
        (["--prompt", "for", "--seed", 2**63], r"seed: expected an integer < 2\^63, got 9223372036854775808"),
    ],
)
def test_generate_errors(trained, arguments, message):
    result = fastlm_command("generate", "--model", trained[0], *arguments)
    assert result.exit_code == 1
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr


def test_a_prompt_outside_the_vocabulary_is_named(trained, text_file, tmp_path):
    out = tmp_path / "char"
    run("train", text_file, *TINY, "--steps", 1, "--tokenizer", "char", "--out", out)
    result = fastlm_command("generate", "--model", out, "--prompt", "Ω")
    assert result.stderr == "error: prompt: expected characters of the tokenizer's vocabulary, got 'Ω'\n"


def test_missing_model_and_wrong_kind_of_model(trained_bert, tmp_path):
    result = fastlm_command("generate", "--model", tmp_path / "none", "--prompt", "x")
    assert result.exit_code == 1 and re.fullmatch(r"error: .*none/config.json: no such file.*\n", result.stderr)
    (tmp_path / "model.txt").write_text("")
    result = fastlm_command("generate", "--model", tmp_path / "model.txt", "--prompt", "x")
    assert result.exit_code == 1 and re.fullmatch(
        r"error: .*/model.txt/config.json: no such file; expected a local directory .*\n", result.stderr
    )
    result = fastlm_command("generate", "--model", trained_bert[0], "--prompt", "x")
    assert result.exit_code == 1 and re.fullmatch(
        r"error: model: expected a causal language model .*, got the BertForMaskedLM in .*\n", result.stderr
    )


def test_predict_next_tokens(trained):
    out, _ = trained
    output = run("predict", "--model", out, "for ", "--top", 3, "--temperature", 2)
    logits = load_model(out)(input_ids=torch.tensor([load_tokenizer(out).encode("for ")])).logits[0, -1]
    scores, tokens = logits.topk(3)
    rows = re.findall(r"│ '(.+?)' +│ +(-?\d+\.\d+) │ +(\d+\.\d+) % │", output)
    assert [float(score) for _, score, _ in rows] == pytest.approx(scores.tolist(), abs=6e-4)
    assert [float(p) for _, _, p in rows] == pytest.approx(
        [100 * p for p in (logits / 2).softmax(-1)[tokens].tolist()], abs=6e-3
    )
    assert "temperature 2" in output


def test_predict_threads(trained):
    rows = [run("predict", "--model", trained[0], "for ", "--threads", n) for n in (1, 2)]
    assert rows[0] == rows[1]
    result = fastlm_command("predict", "--model", trained[0], "for ", "--threads", 0)
    assert result.exit_code == 1 and result.stderr == "error: threads: expected an integer >= 1, got 0\n"


def test_predict_masks(trained_bert):
    output = run("predict", "--model", trained_bert[0], "f[MASK]r l[MASK]ne", "--top", 2)
    assert re.findall(r"│ +(\d) │", output) == ["1", "1", "2", "2"]
