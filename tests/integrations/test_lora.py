import pytest
import torch
from torch.nn import functional as F

from fastlm.integrations.lora import LoraModel
from fastlm.models import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    CausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    load_model,
)

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 16}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": None}
GPT2 |= {"eos_token_id": None, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
LLAMA = {**SIZES, "bos_token_id": None, "eos_token_id": None}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: CausalLM(LlamaConfig(**LLAMA)),
    "llama, tied": lambda: CausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, **DROPOUT)),
}


@pytest.fixture(params=MODELS)
def directory(request, tmp_path):
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def adapted(directory, **changes):
    return LoraModel(directory, **{"rank": 4, "alpha": 8, "dropout": 0.0, "seed": 0} | changes)


def test_the_merged_model_computes_the_same(directory, tmp_path):
    model, x = adapted(directory), torch.randint(50, (3, 9))
    plain = load_model(directory)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=x).logits, plain(x).logits)  # the adapters are 0 at first
        for p in model.adapters().values():
            p.normal_(0, 0.2)
        expected = model(input_ids=x).logits
        assert (expected - plain(x).logits).abs().max() > 0.1
        (tmp_path / "merged").mkdir()
        model.write_files(tmp_path / "merged")
        torch.testing.assert_close(load_model(tmp_path / "merged")(x).logits, expected, rtol=1e-4, atol=1e-5)
    assert model.num_parameters() == plain.num_parameters() + sum(p.numel() for p in model.adapters().values())
    # Names and shapes are those of the original, and what is written is a copy taken earlier.
    before = {name: torch.zeros_like(p) for name, p in model.state_dict().items()}
    (tmp_path / "unchanged").mkdir()
    model.write_files(tmp_path / "unchanged", before)
    assert (tmp_path / "unchanged/model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


def test_loss_and_gradients(directory):
    """The loss is that of all targets, the last one included; only adapters are trained."""
    model = adapted(directory).train()
    inputs, targets = torch.randint(50, (2, 3, 9))
    loss = model.loss(model, inputs, targets)
    logits = load_model(directory)(inputs).logits
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), rel=1e-5)
    loss.backward()
    adapters = model.adapters()
    assert {name for name, p in model.adapted.named_parameters() if p.grad is not None} == set(adapters)
    assert all(".lora_" in name for name in adapters)


@pytest.mark.parametrize("directory", ["gpt2", "llama"], indirect=True)
def test_packed_documents(directory):
    """Attention does not cross their boundaries: the loss is that of each document by itself."""
    model = adapted(directory).train()
    tokens, targets = torch.randint(50, (2, 2, 9))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], range(9)])
    loss = model.loss(model, torch.stack((tokens, positions), 1), targets)
    documents = [(tokens[:1, 0:3], targets[:1, 0:3]), (tokens[:1, 3:7], targets[:1, 3:7])]
    documents += [(tokens[:1, 7:], targets[:1, 7:]), (tokens[1:], targets[1:])]
    expected = sum(model.loss(model, *some).item() * some[0].numel() for some in documents) / tokens.numel()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_checkpointing(directory):
    """The same loss and gradients, with the dropout of the adapters."""
    inputs, targets = torch.randint(50, (2, 3, 9))
    results = []
    for enabled in (False, True):
        model = adapted(directory, dropout=0.2).train()
        if enabled:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        loss = model.loss(model, inputs, targets)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.adapters().values())])
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.adapted.modules())
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_merged_models(directory):
    """With the weights of the adapters that are given; without them once they were forgotten."""
    model, x = adapted(directory), torch.randint(50, (3, 9))
    with torch.no_grad():
        for p in model.adapters().values():
            p.normal_(0, 0.2)
        found = model.merged_model(model.state_dict(), torch.device("cpu"))
        torch.testing.assert_close(found(x).logits, model.eval()(input_ids=x).logits, rtol=1e-4, atol=1e-5)
        count = model.num_parameters()
        model.forget_base()
        assert model.num_parameters() == count and all(p.is_meta for p in model.own[0].parameters())
        torch.testing.assert_close(found(x).logits, model(input_ids=x).logits, rtol=1e-4, atol=1e-5)


def test_state(directory):
    model, other = adapted(directory), adapted(directory, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), adapted(directory).parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    other.load_training_state(model.training_state())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_samples_leave_the_generator_as_it_was(tmp_path):
    MODELS["gpt2"]().save_pretrained(tmp_path)
    model, before = adapted(tmp_path), torch.get_rng_state()
    texts = [
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=5, temperature=0.8, eos_token_id=(), seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2]) and texts[0].shape == (1, 7)
    assert torch.equal(torch.get_rng_state(), before) and model.training


def test_another_kind_of_model(tmp_path):
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="init: expected a model that predicts the next or a masked token, got a Bert"):
        adapted(tmp_path)
