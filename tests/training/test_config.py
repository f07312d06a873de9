import dataclasses

import pytest
import torch

from fastlm.models import BertForMaskedLM, CausalLM, GPT2LMHeadModel
from fastlm.training import config
from fastlm.training.config import INPUTS, PRESETS, read, resolve, write
from fastlm.training.models import build
from fastlm.training.settings import Settings
from fastlm.training.tokenizers import byte_tokenizer

DEFAULTS = {"data": [], "tokenizer": "byte", "init": None, "val_fraction": 0.1, "val_file": None}


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "run.toml").write_text(text, "utf-8")
        return tmp_path / "run.toml"

    return write


def test_precedence(file):
    """Flags, then the file, then the preset, then the defaults."""
    settings, inputs = resolve(
        "gpt2-124m", file('lr = 1\nbatch = 3\nmicro_batch = 2\ndata = "a"'), {"batch": 5, "seed": 7}, DEFAULTS
    )
    assert (settings.layers, settings.lr, settings.batch, settings.seed, settings.beta1) == (12, 1.0, 5, 7, 0.9)
    assert inputs == DEFAULTS | {"data": ["a"]}
    settings, inputs = resolve(None, file('preset = "shakespeare-char"\nwidth = 64'), {"val_fraction": 0.2}, DEFAULTS)
    assert (settings.width, settings.steps) == (64, 2000) and inputs["tokenizer"] == "char"
    assert inputs["val_fraction"] == 0.2
    assert resolve(None, None, {}, DEFAULTS) == (Settings(), DEFAULTS)


def test_what_is_written_is_read_again(tmp_path):
    settings = dataclasses.replace(Settings(), prompt='"\\\n\t\x00\x7f\x80é😀', tensorboard=True, lr=1e-7, min_lr=0.0)
    inputs = DEFAULTS | {"data": ["a b", 'c"']}
    write(tmp_path / "config.toml", inputs | dataclasses.asdict(settings))
    assert resolve(None, tmp_path / "config.toml", {}, DEFAULTS) == (settings, inputs)


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning = 1", "config: expected keys of settings in FILE, got 'learning'"),
        ("laeyrs = 1", "config: expected keys of settings in FILE, got 'laeyrs'; did you mean 'layers'?"),
        ("layers = 1.5", "layers: expected an integer in FILE, got 1.5"),
        ("layers = true", "layers: expected an integer in FILE, got True"),
        ('lr = "x"', "lr: expected a number in FILE, got 'x'"),
        ("data = [1]", "data: expected a list of strings in FILE, got [1]"),
        ("layers = ", "config: expected TOML in FILE, got Invalid value (at end of document)"),
        ("layers = 0", "layers: expected an integer >= 1, got 0"),
        ('preset = "gpt2"', "preset: expected one of gpt2-124m, "),
    ],
)
def test_errors(file, text, message):
    path = file(text)
    with pytest.raises(ValueError) as error:
        resolve(None, path, {}, DEFAULTS)
    assert str(error.value).startswith(message.replace("FILE", str(path)))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config: could not read '.*none.toml': No such file"):
        read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "name, kind, vocabulary, parameters",
    [
        # The numbers of parameters with the vocabularies that the models were published with.
        ("gpt2-124m", GPT2LMHeadModel, 50257, 124_439_808),
        ("gpt2-355m", GPT2LMHeadModel, 50257, 354_823_168),
        ("gpt2-774m", GPT2LMHeadModel, 50257, 774_030_080),
        ("gpt2-1558m", GPT2LMHeadModel, 50257, 1_557_611_200),
        ("bert-base", BertForMaskedLM, 30522, 109_514_298),
        ("smollm2-135m", CausalLM, 49152, 134_515_008),
        ("shakespeare-char", GPT2LMHeadModel, 65, 809_856),
    ],
)
def test_presets(name, kind, vocabulary, parameters):
    settings, _ = resolve(name, None, {}, DEFAULTS)
    tokenizer = byte_tokenizer(masked=settings.objective == "masked-token")
    with torch.device("meta"):
        model = build(settings, tokenizer)
    assert isinstance(model, kind)
    rest = vocabulary - tokenizer.get_vocab_size()
    assert model.num_parameters() + rest * (settings.width + (kind is BertForMaskedLM)) == parameters


def test_names_are_those_of_settings():
    names = {field.name for field in dataclasses.fields(Settings)}
    assert not names & set(INPUTS)
    assert all(set(preset) <= names | set(INPUTS) for preset in PRESETS.values())
    assert config.CONFIG == "config.toml"
