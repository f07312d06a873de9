import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import rich.console
import tokenizers
import torch

from fastlm.commands import display, train
from fastlm.generation import load_tokenizer
from fastlm.models import (
    BertConfig,
    BertForMaskedLM,
    CausalLM,
    EncoderForMaskedLM,
    GPT2LMHeadModel,
    LlamaConfig,
    RobertaConfig,
    load_model,
)
from fastlm.training import estimate
from tests.commands.support import TEXT, TINY, assert_same_run, fastlm_command, process, run


def test_train_prints_the_validation_loss_and_writes_a_summary(trained, text_file):
    out, output = trained
    summary = json.loads((out / "summary.json").read_text())
    assert output.splitlines()[-1] == f"val loss {summary['val_loss']:.4f}"
    assert re.search(r"^step 5: train loss \d\.\d{4}, val loss \d\.\d{4}$", output, re.MULTILINE)
    assert summary["settings"] == {
        "data": [str(text_file)],
        "tokenizer": "byte",
        "init": None,
        "val_fraction": 0.1,
        "val_file": None,
        "field": "text",
        "cache": None,
        "objective": "next-token",
        "documents": "stream",
        "whole_words": False,
        "layers": 1,
        "heads": 2,
        "width": 32,
        "context": 16,
        "batch": 4,
        "steps": 12,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "warmup": 2,
        "decay_steps": None,
        "beta1": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "dropout": 0.0,
        "seed": 0,
        "dtype": "float32",
        "eval_every": 5,
        "architecture": None,
        "kv_heads": None,
        "lora": 0,
        "lora_alpha": None,
        "mlp_width": None,
        "micro_batch": None,
        "schedule": "cosine",
        "decay_fraction": 0.2,
        "max_skipped": 10,
        "skip_spikes": 0.0,
        "ema": 0.0,
        "patience": 0,
        "sample_every": 0,
        "prompt": "\n",
        "tensorboard": False,
        "recompute": 1,
        "checkpoint_every": 250,
        "keep": 2,
        "device": "cpu",
        "threads": 1,
        "processes": 1,
        "parallel": "ddp",
    }
    assert summary["steps"] == 12 and not summary["interrupted"] and summary["tokens_per_second"] > 0
    assert 0 < summary["train_loss"] < 6 and [e["step"] for e in summary["evaluations"]] == [5, 10, 12]
    assert summary["evaluations"][-1]["val_loss"] == summary["val_loss"]
    size = len(TEXT.encode())
    assert summary["tokens"] == {"training": round(0.9 * size), "validation": size - round(0.9 * size)}


def test_train_writes_a_model_that_can_be_loaded(trained):
    out, _ = trained
    model = load_model(out)
    assert isinstance(model, GPT2LMHeadModel)
    assert (
        model.config.n_layer,
        model.config.n_head,
        model.config.n_embd,
        model.config.n_positions,
        model.config.vocab_size,
    ) == (1, 2, 32, 16, 256)
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(out)) == sorted(
        [*files, "summary.json", "run.json", "config.toml", "metrics.jsonl", "checkpoints", "tokens"]
    )


def test_train_options(text_file, tmp_path):
    (tmp_path / "val.txt").write_text("print(lines)\n" * 10)
    (tmp_path / "more.txt").write_text("more")
    given = {
        "tokenizer": "char",
        "layers": 2,
        "heads": 4,
        "width": 16,
        "context": 8,
        "batch": 3,
        "steps": 4,
        "lr": 0.002,
        "min_lr": 0.0003,
        "warmup": 1,
        "decay_steps": 3,
        "beta1": 0.8,
        "beta2": 0.95,
        "weight_decay": 0.2,
        "grad_clip": 0.5,
        "dropout": 0.1,
        "seed": 7,
        "dtype": "bf16",
        "objective": "next-token",
        "documents": "packed",
        "field": "body",
        "cache": str(tmp_path / "cache"),
        "eval_every": 2,
        "architecture": "gpt2",
        "mlp_width": 48,
        "micro_batch": 2,
        "schedule": "wsd",
        "decay_fraction": 0.5,
        "max_skipped": 5,
        "skip_spikes": 9.5,
        "ema": 0.5,
        "patience": 7,
        "sample_every": 2,
        "prompt": "for",
        "recompute": 2,
        "checkpoint_every": 2,
        "keep": 1,
        "val_file": str(tmp_path / "val.txt"),
        "device": "cpu",
        "parallel": "fsdp",
        "threads": 2,
    }
    flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    flags.append("--tensorboard")
    output = run("train", "--data", text_file, tmp_path / "more.txt", *flags, "--out", tmp_path / "out")
    assert "step 2: sample " in output and list((tmp_path / "out" / "tensorboard").iterdir())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"] == given | {
        "dtype": "bfloat16",
        "data": [str(text_file), str(tmp_path / "more.txt")],
        "init": None,
        "val_fraction": None,
        "whole_words": False,
        "tensorboard": True,
        "kv_heads": None,
        "lora": 0,
        "processes": 1,
        "lora_alpha": None,
    }
    assert load_model(tmp_path / "out").config.resid_pdrop == 0.1
    # At step 2 there was an evaluation.
    assert sorted(os.listdir(tmp_path / "out" / "checkpoints")) == ["step-00000002", "step-00000004"]


def test_a_run_is_repeated_from_its_config(trained, tmp_path):
    out, _ = trained
    run("train", "--config", out / "config.toml", "--out", tmp_path / "again", "--threads", 1)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "config.toml").read_bytes() == (out / "config.toml").read_bytes()
    run("train", "--config", out / "config.toml", "--steps", 1, "--out", tmp_path / "short")
    assert json.loads((tmp_path / "short" / "summary.json").read_text())["steps"] == 1


def test_early_stopping(text_file, tmp_path):
    arguments = ["--steps", 50, "--lr", 1e-9, "--min-lr", 0, "--eval-every", 2, "--checkpoint-every", 2]
    output = run("train", text_file, *TINY, *arguments, "--patience", 2, "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    best = min(summary["evaluations"], key=lambda evaluation: evaluation["val_loss"])
    assert summary["stopped_early"] and not summary["interrupted"] and summary["steps"] == best["step"] + 4
    folder = tmp_path / "out" / "checkpoints" / f"step-{best['step']:08}"
    assert f"lowest val loss {best['val_loss']:.4f} after step {best['step']}, in {folder}\n" in output
    assert f"stopped early after {summary['steps']} steps" in output and load_model(folder)


def test_train_a_llama(text_file, tmp_path):
    out, sizes = tmp_path / "out", ["--architecture", "llama", "--kv-heads", 1, "--mlp-width", 40]
    run("train", text_file, *TINY, *sizes, "--tokenizer", "char", "--steps", 60, "--lr", 1e-2, "--out", out)
    model = load_model(out)
    assert isinstance(model, CausalLM) and model.config.num_key_value_heads == 1
    losses = [e["val_loss"] for e in json.loads((out / "summary.json").read_text())["evaluations"]]
    assert losses[-1] < 1.5 < losses[0]


def test_train_is_bit_reproducible(trained, text_file, tmp_path):
    run("train", "--data", text_file, *TINY, "--out", tmp_path, "--threads", 1)
    assert (tmp_path / "model.safetensors").read_bytes() == (trained[0] / "model.safetensors").read_bytes()


def test_train_with_masked_tokens(trained_bert):
    out, output = trained_bert
    model = load_model(out)
    assert isinstance(model, BertForMaskedLM) and re.search(r"^val loss \d\.\d{4}$", output.splitlines()[-1])
    assert model.config.vocab_size == len(set(TEXT)) + 2 == load_tokenizer(out).vocab_size


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--data", "nowhere.txt"],
            "data: expected a file, a directory with text files or a pattern .*, got 'nowhere.txt'",
        ),
        (["--data", "empty.txt"], "data: expected a text that is not empty, got 1 empty file, the first is empty.txt"),
        (
            ["--data", "short.txt"],
            r"data: expected at least 65 tokens for training \(one context of 64 and the next token\), got 9",
        ),
        (
            ["--data", "text.txt", "--val-file", "short.txt"],
            r"val_fraction or val_file: expected at least 65 tokens for validation \(.*\), got 10",
        ),
        (["--data", "text.txt", "--layers", "0"], "layers: expected an integer >= 1, got 0"),
        (["--data", "text.txt", "--heads", "5"], "width: expected a multiple of heads = 5, got 128"),
        (["--data", "text.txt", "--dropout", "1"], r"dropout: expected a number in \[0, 1\), got 1.0"),
        (
            ["--data", "text.txt", "--objective", "guess"],
            "objective: expected one of next-token, masked-token, got 'guess'",
        ),
        (
            ["--data", "text.txt", "--tokenizer", "bpe"],
            "tokenizer: expected byte, char, a tokenizer.json or a directory with one, got 'bpe'",
        ),
        (["--data", "text.txt", "--threads", "0"], "threads: expected an integer >= 1, got 0"),
        (
            ["--data", "text.txt", "--out", "text.txt"],
            "out: expected a directory or a path for a new one, got the file 'text.txt'",
        ),
        (["--data", "text.txt", "--layers", "many"], "Invalid value for '--layers': .*integer.*"),
        (["--data", "text.txt", "--colour", "red"], "No such option: --colour.*"),
        (["--data", "text.txt", "--stpes", "3"], r"No such option: --stpes .*--steps.*"),
        ([], "data: expected at least one file, directory or pattern, got none"),
        (["--data", "text.txt", "--seed", 2**63], r"seed: expected an integer < 2\^63, got 9223372036854775808"),
        (
            ["text.txt", "--objective", "next-tokens"],
            "objective: expected one of next-token, masked-token, got 'next-tokens'; did you mean 'next-token'\\?",
        ),
    ],
)
def test_train_errors_are_one_line_and_write_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, text in {"text.txt": TEXT, "empty.txt": "", "short.txt": "0123456789"}.items():
        (tmp_path / name).write_text(text)
    before = sorted(os.listdir(tmp_path))
    result = fastlm_command("train", *arguments)
    assert result.exit_code in (1, 2)
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr
    assert sorted(os.listdir(tmp_path)) == before


def test_a_prompt_outside_the_vocabulary_is_an_error_before_the_run_starts(text_file, tmp_path):
    arguments = ["train", text_file, *TINY, "--tokenizer", "char", "--sample-every", 5, "--prompt", "Ω"]
    result = fastlm_command(*arguments, "--out", tmp_path / "out")
    message = "error: prompt: expected characters of the tokenizer's vocabulary, got 'Ω'\n"
    assert result.exit_code == 1 and result.stderr == message
    assert not (tmp_path / "out" / "run.json").exists() and not (tmp_path / "out" / "checkpoints").exists()


def test_a_dry_run_beside_an_earlier_run(trained, text_file, monkeypatch):
    """It writes nothing, so that it need not be told where."""
    out, _ = trained
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(train, "show_estimate", lambda *arguments: print("the estimate"))
    assert run("train", text_file, *TINY, "--dry-run", "--out", out) == "the estimate\n"
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_train_takes_files_without_an_option(trained, text_file, tmp_path):
    (tmp_path / "more.txt").write_text("more")
    run("train", text_file, tmp_path / "more.txt", *TINY, "--out", tmp_path / "out", "--threads", 1)
    settings = json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]
    assert settings["data"] == [str(text_file), str(tmp_path / "more.txt")]
    usage = run("train", "--help")
    assert "[PATH]..." in usage and "--data" in usage


def test_train_names_the_files_that_it_skips(text_file, tmp_path):
    folder = tmp_path / "data"
    (folder / ".git").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXT)
    assert "skipped" not in run("train", folder / "a.txt", *TINY, "--out", tmp_path / "out")
    (folder / "picture").write_bytes(b"\x89PNG\0")
    for i in range(6):
        (folder / ".git" / f"{i}").write_text("x")
    output = run("train", folder, *TINY, "--out", tmp_path / "out", "--overwrite")
    names = ", ".join(str(folder / ".git" / f"{i}") for i in range(5))
    assert f"skipped 7 files, hidden or binary: {names} and 2 more\n" in output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["skipped"][-1] == str(folder / "picture")


@pytest.mark.parametrize("command", ["train", "demo"])
def test_an_earlier_model_is_not_overwritten(command, trained, text_file, tmp_path, small_demo):
    arguments = {"train": ["train", text_file, *TINY], "demo": ["demo", "--seconds", 0.1]}[command]
    out, options = tmp_path / "out", "--overwrite replaces it" + ", --resume continues it" * (command == "train")
    shutil.copytree(trained[0], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = fastlm_command(*arguments, "--out", out)
    assert result.exit_code == 1 and result.stderr == (
        f"error: out: expected a directory without a model, got {str(out)!r}, which has config.json; {options}\n"
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    run(*arguments, "--out", out, "--overwrite")
    assert (out / "summary.json").read_bytes() != before[out / "summary.json"]


def test_train_from_a_model(trained, text_file, tmp_path):
    """Its weights, tokenizer and settings are the start."""
    earlier, _ = trained
    before = json.loads((earlier / "summary.json").read_text())
    arguments = ["--init", earlier, "--context", 16, "--batch", 4, "--steps", 1, "--warmup", 0, "--lr", 1e-6]
    run("train", text_file, *arguments, "--min-lr", 0, "--out", tmp_path / "out", "--threads", 1)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert abs(summary["val_loss"] - before["val_loss"]) < 1e-3 and summary["settings"]["init"] == str(earlier)
    assert load_tokenizer(tmp_path / "out").encode(TEXT) == load_tokenizer(earlier).encode(TEXT)


@pytest.fixture
def decoder(tmp_path):
    """A small Llama with a tokenizer of its own."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=270, special_tokens=["<s>"])
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64)
    torch.manual_seed(0)
    CausalLM(config).bfloat16().save_pretrained(tmp_path / "llama")
    tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    (tmp_path / "llama" / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    return tmp_path / "llama"


def test_train_from_a_decoder(decoder, text_file, tmp_path):
    arguments = ["--context", 32, "--batch", 4, "--steps", 60, "--lr", 1e-2, "--warmup", 5]
    run("train", text_file, "--init", decoder, *arguments, "--out", tmp_path / "out", "--threads", 1)
    model = load_model(tmp_path / "out")
    assert isinstance(model, CausalLM) and model.dtype == torch.float32
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["val_loss"] < 1.0  # log 270 is 5.6
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((decoder / name).read_text())
    generated = run("generate", "--model", tmp_path / "out", "--prompt", "for line in", "--max-new-tokens", 20)
    assert "lines" in generated


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layers", 2], "layers: expected no value with a model to start from, which has its own, got 2"),
        (
            ["--tokenizer", "char"],
            "tokenizer: expected no value with a model to start from, which has its own, got 'char'",
        ),
        (["--lora", -1], "lora: expected an integer >= 0, got -1"),
        (["--lora-alpha", 8], "lora_alpha: expected no value without --lora, got 8"),
        (["--context", 65], "context: expected at most 64, the context of the model in .*, got 65"),
        (
            ["--objective", "masked-token"],
            "objective: expected next-token for the CausalLM in .*, got 'masked-token'",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_to_start_from(arguments, message, decoder, text_file, tmp_path):
    result = fastlm_command("train", text_file, "--init", decoder, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 1 and re.fullmatch(f"error: {message}\n", result.stderr), result.stderr


def test_train_adapters(decoder, text_file, tmp_path):
    """The weights of the model to start from stay as they are; the run has the merged model and the adapters."""
    before = (decoder / "model.safetensors").read_bytes()
    arguments = ["--lora", 8, "--context", 32, "--batch", 4, "--steps", 60, "--lr", 3e-2, "--warmup", 5]
    arguments += ["--sample-every", 30, "--prompt", "for line", "--ema", 0.9]
    output = run("train", text_file, "--init", decoder, *arguments, "--out", tmp_path / "out", "--threads", 1)
    assert "of them in adapters, which are trained" in output and "step 30: sample " in output
    assert (decoder / "model.safetensors").read_bytes() == before
    val_loss = json.loads((tmp_path / "out" / "summary.json").read_text())["val_loss"]
    assert val_loss < 5.4  # log 270 is 5.6; the embeddings are random and stay so
    (tmp_path / "val.txt").write_text(TEXT[round(0.9 * len(TEXT)) :])
    windows = ["--context", 32, "--stride", 32]
    scores = json.loads(run_json(tmp_path, "eval", "--model", tmp_path / "out", tmp_path / "val.txt", *windows))
    assert scores["loss"] == pytest.approx(val_loss, abs=0.02)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / "out" / "adapter"))


def test_adapters_on_packed_documents_and_their_estimate(decoder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "SECONDS", 0.01)
    monkeypatch.setattr(estimate, "SHORT", 0.01)
    arguments = ["train", text_file, "--init", decoder, "--lora", 8, "--context", 32, "--batch", 4, "--steps", 2]
    arguments += ["--documents", "packed", "--val-file", text_file, "--out", tmp_path / "out", "--threads", 1]
    arguments += ["--recompute", 3]
    output = run(*arguments, "--dry-run")
    assert re.search(
        r"[\d,]+ parameters, float32, 1 thread\nmemory: [\d.]+ GiB of [\d.]+ GiB available, measured\n"
        r"time per step: \S+ seconds, [\d,]+ tokens/s\ntime of the run: \S+ \w+ \(start \S+ \w+, 2 steps \S+ seconds, "
        r"1 evaluation \S+ seconds, 1 checkpoint \S+ seconds\)\n$",
        output,
    )
    assert not (tmp_path / "out").exists()
    assert "trained for 2 steps" in run(*arguments)


def test_adapters_recompute_whole_layers_or_as_usual(decoder, text_file, tmp_path):
    arguments = ["train", text_file, "--init", decoder, "--lora", 8, "--recompute", 2, "--out", tmp_path / "out"]
    result = fastlm_command(*arguments)
    message = "error: recompute: expected 1 or 3 with lora, got 2\n"
    assert result.exit_code == 1 and result.stderr == message and not (tmp_path / "out").exists()


def test_adapters_need_a_model_to_start_from(text_file, tmp_path):
    result = fastlm_command("train", text_file, *TINY, "--lora", 8, "--out", tmp_path / "out")
    assert result.stderr == "error: lora: expected 0 without --init, the model that adapters are added to, got 8\n"


@pytest.mark.parametrize("family, mask", [("BERT", "[MASK]"), ("RoBERTa", "<mask>")])
def test_train_from_an_encoder(text_file, tmp_path, family, mask):
    """With its own tokenizer, whose special tokens come first."""
    vocabulary = ["[PAD]", "[UNK]", mask, *sorted(set(TEXT) - {" ", "\n"})]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Whitespace(), tokenizers.pre_tokenizers.Split("", "isolated")]
    )
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 18, "pad_token_id": 0}
    torch.manual_seed(0)
    config = {"BERT": BertConfig, "RoBERTa": RobertaConfig}[family](**sizes)
    EncoderForMaskedLM(config).save_pretrained(tmp_path / "init")
    tokenizer.save(str(tmp_path / "init" / "tokenizer.json"))
    (tmp_path / "init" / "tokenizer_config.json").write_text(json.dumps({"mask_token": mask}))
    arguments = ["--objective", "masked-token", "--context", 16, "--batch", 8, "--steps", 120, "--lr", 1e-2]
    run("train", text_file, "--init", tmp_path / "init", *arguments, "--warmup", 5, "--out", tmp_path / "out")
    before, after = (
        json.loads(run_json(tmp_path, "eval", "--model", folder, text_file, "--context", 16))["loss"]
        for folder in (tmp_path / "init", tmp_path / "out")
    )
    assert after < 0.8 * before and load_model(tmp_path / "out").config.model_type == config.model_type


def run_json(folder, *arguments):
    run(*arguments, "--json", folder / "result.json")
    return (folder / "result.json").read_text()


def test_the_objective_is_that_of_the_model_to_start_from(trained_bert, text_file, tmp_path):
    result = fastlm_command("train", text_file, "--init", trained_bert[0], "--context", 16, "--out", tmp_path / "out")
    expected = "objective: expected masked-token for the BertForMaskedLM in .*, got 'next-token'"
    assert re.search(expected, result.stderr)


def test_train_on_a_full_disk(text_file, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # write() fails, as on a full disk
    try:
        result = fastlm_command("train", "--data", text_file, *TINY, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 1
    assert re.fullmatch(r"error: out: could not save to '.*out'; no file was written: .*\n", result.stderr), (
        result.stderr
    )
    assert os.listdir(tmp_path / "out" / "checkpoints") == []
    # A run without a checkpoint is not worth protecting.
    run("train", "--data", text_file, *TINY, "--out", tmp_path / "out")


def test_out_of_memory_is_a_one_line_error(text_file, tmp_path):
    result = fastlm_command("train", "--data", text_file, *TINY, "--batch", 2**50, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert (
        result.stderr
        == "error: out of memory: reduce --batch, --context, --width, --layers or --max-tokens-per-batch\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_is_saved_and_goes_on(text_file, tmp_path, number):
    settings = [*TINY, "--threads", 1, "--eval-every", 10, "--dropout", 0.1]
    run("train", text_file, *settings, "--steps", 150, "--out", tmp_path / "whole")
    with process("train", text_file, *settings, "--steps", 150, "--out", "out", cwd=tmp_path) as running:
        assert any(line.startswith("step 10:") for line in running.stdout)
        running.send_signal(number)
        output, errors = running.communicate(timeout=60)
    assert running.returncode == 0 and errors == ""
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    steps = summary["steps"]
    assert summary["interrupted"] and 10 <= steps < 150
    ended, command, last = output.splitlines()[-3:]
    assert ended.startswith(f"interrupted after {steps} steps") and last == f"val loss {summary['val_loss']:.4f}"
    assert command == "to go on: fastlm train --resume out"
    assert load_model(tmp_path / "out").config.n_layer == 1
    assert f"resumed after {steps} steps of 150\n" in run("train", "--resume", tmp_path / "out")
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("library", ["libc10", "libtorch_python", "_cpu_features"])
def test_interrupted_while_modules_are_imported(text_file, tmp_path, library):
    """When a library of PyTorch, or this package's first one, has been loaded."""
    with process("train", text_file, *TINY, "--steps", 10**6, "--out", "out", cwd=tmp_path) as running:
        deadline = time.monotonic() + 120
        while library not in Path(f"/proc/{running.pid}/maps").read_text() and time.monotonic() < deadline:
            time.sleep(0.001)
        running.send_signal(signal.SIGINT)
        output, errors = running.communicate(timeout=60)
    assert (running.returncode, output, errors) == (130, "", "interrupted\n")


@pytest.mark.parametrize("kind", ["float32", "float16", "adapters"])
def test_the_bar_in_a_wide_terminal(kind, decoder, text_file, tmp_path, monkeypatch):
    wide = rich.console.Console(force_terminal=True, width=160, file=io.StringIO(), highlight=False)
    monkeypatch.setattr(display, "console", wide)
    adapters = ["--init", decoder, "--lora", 4, "--context", 32, "--batch", 4, "--steps", 4, "--threads", 1]
    options = adapters if kind == "adapters" else [*TINY, "--dtype", kind]
    run("train", text_file, *options, "--out", tmp_path / "out")
    assert re.search(r"tokens/s [^\n]*\d+ % of peak, \d+\.\d GiB", wide.file.getvalue())


def test_a_missing_package_is_an_error_before_anything_is_written(text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = fastlm_command("train", text_file, *TINY, "--tensorboard", "--out", tmp_path / "out")
    expected = 'error: tensorboard: expected an installation with tensorboard (pip install "fastlm[tensorboard]"), got '
    assert result.exit_code == 1 and result.stderr.startswith(expected) and not (tmp_path / "out").exists()
