"""benchmarks/peers: fastlm.encode beside other libraries, each in a process of its own."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

import fastlm
from benchmarks.peers import __main__ as peers
from benchmarks.peers.shapes import SHAPES, write
from benchmarks.peers.texts import PROFILES, QUERY
from fastlm.integrations.encoding.tokens import load_tokenizer
from tests.encoding.support import save

LIBRARIES = ["fastlm_encode", "pytorch", *peers.PEERS]
SMALL = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 50}
TEXTS = [["ab ac ad"], ["", "ba " * 30]]
PAIRED = [["ab ac ad", "ba " * 30, "ca"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pooling = {"pooling_mode_mean_tokens": True}
    described = {"position_embedding_type": "absolute"}  # CTranslate2's converter reads it
    return save(tmp_path_factory.mktemp("model"), pooling=pooling, after=["Normalize"], **described)


def test_the_profiles_have_different_lengths():
    means = {name: sum(map(len, texts)) / len(texts) for name, (make, n) in PROFILES.items() if (texts := make(n))}
    assert means["queries"] < 80 < 200 < means["passages"] < 2000 < means["documents"]
    assert all(len(set(make(number))) == number for make, number in PROFILES.values())


def results_of(library, directory, calls, query=None):
    if library in peers.PEERS and peers.missing(library):
        pytest.skip("pip install '.[peers]'")
    peer = peers.Peer(library, directory, 1)
    assert "failed" not in peer.described and peer.described["version"] and peer.described["options"], peer.described
    results = torch.tensor(peer.run(calls, 2, query, results=True)["results"])
    peer.close()
    assert peer.process.returncode == 0
    return results


@pytest.fixture(scope="module")
def embeddings(model):
    return results_of("pytorch", model, TEXTS)


@pytest.mark.parametrize("name", ["fastlm_encode", "fastlm_models", *peers.PEERS])
def test_a_library_computes_the_embeddings_of_pytorch(model, embeddings, name):
    assert embeddings.shape == (3, 36) and embeddings.std() > 1e-2
    torch.testing.assert_close(results_of(name, model, TEXTS), embeddings, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def reranker(model, tmp_path_factory):
    return write("reranker", model, tmp_path_factory.mktemp("reranker"), **SMALL)


@pytest.fixture(scope="module")
def scores(reranker):
    return results_of("pytorch", reranker, PAIRED, QUERY)


@pytest.mark.parametrize("name", ["fastlm_encode", *peers.OTHERS])
def test_a_library_computes_the_scores_of_pytorch(reranker, scores, name):
    assert scores.shape == (3,) and scores.std() > 1e-5
    torch.testing.assert_close(results_of(name, reranker, PAIRED, QUERY), scores, rtol=0, atol=2e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["fastlm_encode", *peers.OTHERS])
def test_a_library_computes_in_bfloat16(model, name):
    if name in peers.PEERS and peers.missing(name):
        pytest.skip("pip install '.[peers]'")
    results = []
    for library, dtype in ((name, "bfloat16"), ("pytorch", "bfloat16"), ("pytorch", "float32")):
        peer = peers.Peer(library, model, 1, dtype)
        if name == "onnxruntime" and library == name:
            assert peer.described == {"failed": "ValueError: it has no kernels in bfloat16 for CPUs"}
        elif "failed" in peer.described:  # of a CPU without instructions for it
            assert name in peers.PEERS and "bfloat16" in peer.described["failed"], peer.described
        else:
            results.append(torch.tensor(peer.run([["ab ac ad", "ba " * 30]], 2, results=True)["results"]))
        peer.close()
    *found, rounded, exact = results
    assert (rounded - exact).abs().max() > 1e-4
    if found and name != "openvino":  # which has float32 on a CPU without instructions for it
        assert (found[0] - exact).abs().max() > 1e-4
    for each in found:
        torch.testing.assert_close(each, rounded, rtol=0, atol=peers.TOLERANCES["bfloat16"])


def test_the_shapes_are_models_with_the_tokenizer_and_pooling_of_another(model, tmp_path):
    like = shutil.copytree(model, tmp_path / "like")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ab", "ac"]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    assert "token_type_ids" in tokenizer.model_input_names
    tokenizer.save_pretrained(like)
    for shape in SHAPES:
        directory = write(shape, like, tmp_path / shape, **SMALL)
        peers.check_model(directory)
        assert fastlm.encode(directory, ["ab ac"]).shape == (1, 36)
        names = load_tokenizer(directory).model_input_names
        assert names == ["input_ids", "attention_mask"]  # what every library is given


class Answers:
    """In place of a Peer: by batch size, its seconds and the only number of its results."""

    def __init__(self, name, answers):
        self.name, self.answers, self.described = name, answers, {"batches": [*answers]}

    def run(self, calls, batch, query, results=False):
        seconds, value = self.answers[batch]
        return {"seconds": seconds, "results": [[value] for texts in calls for _ in texts]}


def test_a_batch_size_with_other_results_is_not_taken():
    nan = float("nan")
    answers = {
        "fastlm_encode": {1024: (1.0, 1.0), 4096: (2.0, 1.0)},
        "pytorch": {1: (5.0, 1.0), 8: (4.0, 1.00001)},
        "openvino": {1: (3.0, 1.0), 8: (2.0, nan), 32: (1.0, 1.1)},
        "onnxruntime": {1: (3.0, nan), 8: (2.0, 1.5)},
    }
    running = [Answers(*each) for each in answers.items()]
    rows = peers.compare(running, "queries", "sorted", [["a", "b"]], None, 0.0, 1e-4)
    batches = {row.peer: row.batch for row in rows}
    assert batches == {"fastlm_encode": 1024, "pytorch": 8, "openvino": 1, "onnxruntime": 8}
    found = {row.peer: (row.speedup.median, row.difference) for row in rows}
    assert found["openvino"] == (3.0, 0.0) and found["onnxruntime"] == (2.0, 0.5)
    assert [row.texts_per_second for row in rows] == [2.0, 0.5, 2 / 3, 1.0]


def test_a_library_that_fails_says_why(tmp_path):
    peer = peers.Peer("pytorch", tmp_path, 1)
    assert "failed" in peer.described


@pytest.mark.nightly
def test_pairs_are_measured(model):
    command = [sys.executable, "-m", "benchmarks.peers", "--model", str(model), "--seconds", "0", "--threads", "1"]
    command += ["--shape", "reranker", "--number", "3", "--peers", "", "--compile"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    assert run.returncode == 0, run.stderr
    for library in ("fastlm_encode", "pytorch", "pytorch_compiled"):
        assert len([line for line in run.stdout.splitlines() if f" {library} " in line and "pairs" in line]) == 2


@pytest.mark.slow
def test_the_table_has_a_row_for_each_and_says_how_to_get_a_missing_one(model, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.peers", "--model", str(model), "--seconds", "0"]
    command += ["--profiles", "queries", "--threads", "1", "--json", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    for name in LIBRARIES:
        if name in peers.PEERS and importlib.util.find_spec(name) is None:
            assert "pip install '.[peers]'" in result["absent"][name] and "pip install '.[peers]'" in run.stdout
        elif name not in result["absent"]:
            rows = [row for row in result["rows"] if row["peer"] == name]
            assert [row["order"] for row in rows] == ["as they come", "sorted", "one at a time"]
            assert all(row["difference"] < 1e-4 for row in rows)
