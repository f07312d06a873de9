"""Code blocks in README.md, CONTRIBUTING.md and docs/ run, their commands parse, and the files that they link exist."""

import re
import shlex

import pytest
import tokenizers
import torch
import typer

import fastlm
from fastlm import cli
from fastlm.models import BertConfig, BertForMaskedLM, CausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig
from tests.encoding import support as encoding
from tests.snippets import CONTRIBUTING, PAGES, README, ROOT, blocks, commands, prose

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

SNIPPETS = [
    pytest.param(snippet, id=f"{page.relative_to(ROOT)} {i + 1}")
    for page in PAGES
    if page != CONTRIBUTING  # its blocks are the files of one example: test_contributing.py
    for i, snippet in enumerate(blocks(page, "python"))
]
COMMANDS = [
    pytest.param(command, id=f"{page.relative_to(ROOT)}: {command}")
    for page in PAGES
    for word in ("fastlm", "make")
    for command in commands(page, word)
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The directories that the blocks read: small models in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**TINY_GPT2)).save_pretrained(folder / "path/to/gpt2")
    BertForMaskedLM(BertConfig(**TINY_BERT)).save_pretrained(folder / "path/to/bert")
    encoding.tokenizer().save_pretrained(folder / "path/to/bert")
    encoding.save(folder / "path/to/reranker", head="ForSequenceClassification", num_labels=1)
    decoder = LlamaConfig(**TINY_BERT, num_key_value_heads=1)
    CausalLM(decoder).save_pretrained(folder / "path/to/decoder")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a text"], vocab_size=300)
    tokenizer.save(str(folder / "path/to/gpt2/tokenizer.json"))
    return folder


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet, checkpoints, monkeypatch):
    if "_cpu_features" in snippet and fastlm.info().build:
        pytest.skip(f"nothing is compiled here: {fastlm.info().build}")
    monkeypatch.chdir(checkpoints)
    exec(compile(snippet, "snippet", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command):
    program, *arguments = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert next(word for word in arguments if "=" not in word) in targets
    else:
        group = typer.main.get_command(cli.app)
        name, *options = arguments
        assert name in group.commands, f"expected one of {', '.join(group.commands)}"
        group.commands[name].make_context(name, options).close()  # raises for an unknown option or a missing argument


@pytest.mark.parametrize("page", (README, CONTRIBUTING), ids=lambda page: page.name)
def test_links_exist(page):  # `make docs` checks those of docs/
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose(page)):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_environment_variables_are_documented():
    name = re.compile(r"\bFASTLM_[A-Z_]+\b")  # not -DFASTLM_…, which defines a macro

    def names_in(*files):
        return {each for file in files for each in name.findall(file.read_text())}

    read = names_in(ROOT / "setup.py", ROOT / "Makefile", *(ROOT / "fastlm").rglob("*.py"))
    documented = names_in(*PAGES)
    macros = names_in(*(ROOT / "csrc").rglob("*.h"))
    assert read <= documented
    assert documented <= read | names_in(*(ROOT / "tests").rglob("*.py")) | macros
