import pytest

from fastlm.models import ElectraConfig, EncoderForMaskedLM
from fastlm.training.bench import Subject
from fastlm.training.flops import flops_of_step
from fastlm.training.models import build
from fastlm.training.objectives import CHOSEN
from fastlm.training.settings import Settings
from fastlm.training.tokenizers import byte_tokenizer


@pytest.mark.parametrize("kind, objective", [("GPT-2", "next-token"), ("BERT", "masked-token")])
def test_equals_the_count_of_the_benchmarks(kind, objective):
    settings = Settings(objective=objective, layers=2, heads=2, width=64, context=128, batch=64)
    tokenizer = byte_tokenizer(masked=objective == "masked-token")
    subject = Subject(kind, 2, 64, 2, tokenizer.get_vocab_size(), 64, 128)
    # Masked positions are drawn.
    found = flops_of_step(build(settings, tokenizer), settings)
    assert found == pytest.approx(subject.flops(), rel=1e-9 if kind == "GPT-2" else 0.005)


def test_a_llama():
    """Of 32 × 32 for queries and outputs, half of it for keys and values, and three matrices of the MLP."""
    settings = Settings(architecture="llama", layers=1, heads=2, kv_heads=1, width=32, mlp_width=40, context=3, batch=1)
    products = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 40 * 32 + 256 * 32
    found = flops_of_step(build(settings, byte_tokenizer(masked=False)), settings)
    assert found == 3 * (6 * products + 3.5 * 4 * 2 * 32)


def test_adapters():
    """Frozen weights have no gradient: two products in place of three."""
    settings = Settings(layers=1, heads=2, width=32, context=3, batch=1)
    model = build(settings, byte_tokenizer(masked=False))
    products, attention = 12 * 32 * 32 + 256 * 32, 3.5 * 4 * 2 * 32
    assert flops_of_step(model, settings, adapters=100) == 3 * (4 * products + 6 * 100 + attention)


def test_an_encoder_with_an_embedding_projection():
    """ELECTRA widens embeddings for every token. Its head narrows predicted ones and multiplies them by the table."""
    config = ElectraConfig(
        vocab_size=300,
        embedding_size=16,
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=64,
        max_position_embeddings=8,
    )
    settings = Settings(objective="masked-token", context=4, batch=1)
    products = 16 * 32 + 2 * (4 * 32 * 32 + 2 * 64 * 32) + CHOSEN * (32 * 16 + 300 * 16)
    found = flops_of_step(EncoderForMaskedLM(config), settings)
    assert found == pytest.approx(4 * (6 * products + 3.5 * 4 * 2 * 4 * 32), rel=1e-12)
