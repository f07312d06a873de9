"""The README says nothing that does not work: each snippet runs, each command parses, each file, target and variable exists."""

import re
import shlex
from pathlib import Path

import pytest
import tokenizers
import torch
import typer

import fastlm
from fastlm import cli
from fastlm.models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

TINY_GPT2 = {
    "vocab_size": 300,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
TINY_BERT = {
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(word):
    lines = [
        line.split("#")[0].strip()
        for page in PAGES
        for block in blocks("sh", page.read_text())
        for line in block.splitlines()
    ]
    return sorted({line for line in lines if line.split()[:1] == [word]})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The directories that the snippets read: small models in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**TINY_GPT2)).save_pretrained(folder / "path/to/gpt2")
    BertForMaskedLM(BertConfig(**TINY_BERT)).save_pretrained(folder / "path/to/bert")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a text"], vocab_size=300)
    tokenizer.save(str(folder / "path/to/gpt2/tokenizer.json"))
    return folder


SNIPPETS = [
    (f"{page.name} {i + 1}", snippet) for page in PAGES for i, snippet in enumerate(blocks("python", page.read_text()))
]


@pytest.mark.parametrize("snippet", [snippet for _, snippet in SNIPPETS], ids=[name for name, _ in SNIPPETS])
def test_snippet_runs(snippet, checkpoints, monkeypatch):
    if "_cpu_features" in snippet and fastlm.info().build:
        pytest.skip(f"nothing is compiled here: {fastlm.info().build}")
    monkeypatch.chdir(checkpoints)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", commands("fastlm"))
def test_command_parses(command):
    name, *arguments = shlex.split(command)[1:]
    group = typer.main.get_command(cli.app)
    assert name in group.commands, f"{command}: expected one of {', '.join(group.commands)}"
    group.commands[name].make_context(name, arguments).close()  # an unknown option or a missing argument raises


def test_every_command_is_described():
    assert {command.split()[1] for command in commands("fastlm")} == set(typer.main.get_command(cli.app).commands)


def test_the_first_two_commands_are_the_first_thing_said():
    assert [line.split("#")[0].strip() for line in blocks("sh")[0].splitlines()] == ["make demo", "make test"]


@pytest.mark.parametrize("command", commands("make"))
def test_make_target_exists(command):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert next(word for word in command.split()[1:] if "=" not in word) in targets


def test_variables_are_documented_and_real():
    names = re.compile(r"FASTLM_[A-Z_]+\b")
    sources = [ROOT / "setup.py", ROOT / "Makefile", *(ROOT / "fastlm").rglob("*.py")]
    read = {name for source in sources for name in names.findall(source.read_text())} - {
        "FASTLM_MODULE"
    }  # a macro of the build's own
    documented = {name for page in PAGES for name in names.findall(page.read_text())}
    by_tests = {
        name
        for file in (ROOT / "tests").rglob("*.py")
        for name in names.findall(file.read_text())
        if name.startswith("FASTLM_TEST_")
    }
    assert read <= documented and documented - read <= by_tests


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
