import keyword
import random

import pytest
import torch

from fastlm.training import data
from fastlm.training.settings import Settings


@pytest.fixture(scope="module", autouse=True)
def cpu_only():
    """Hides GPUs: results are compared bit by bit with those of models on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def text():
    """A small text with a learnable structure: Python keywords and unpredictable numbers."""
    rng = random.Random(0)
    words = keyword.kwlist
    return "".join(f"{rng.choice(words)} {rng.choice(words)} {rng.randrange(100)}\n" for _ in range(4000))


@pytest.fixture(scope="session")
def text_file(text, tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text(text)
    return file


@pytest.fixture(scope="session")
def corpus(text_file):
    return data.load([text_file], tokenizer="char")


@pytest.fixture(scope="session")
def small():
    """Settings of a run of a second or two that learns the words."""
    return Settings(
        layers=2, heads=2, width=64, context=32, batch=8, steps=60, lr=3e-3, min_lr=3e-4, warmup=10, eval_every=25
    )
