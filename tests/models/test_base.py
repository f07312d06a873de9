import copy
import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from fastlm.models import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    encoder_layer,
    gpt2,
)
from tests.models.hugging_face import ours_like, tiny_bert, tiny_gpt2

DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.3}
BERT_DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
MODELS = {
    "GPT-2": lambda: ours_like(tiny_gpt2(**DROPOUT)).train(),
    "BERT": lambda: ours_like(tiny_bert(**BERT_DROPOUT)).train(),
    "classifier": lambda: ours_like(tiny_bert("BertForSequenceClassification", **BERT_DROPOUT)).train(),
}


def on_every_model(test):
    return pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)(test)


def batch_for(model):
    ids = torch.randint(0, 131, (2, 9))
    return {
        "input_ids": ids,
        "labels": torch.tensor([0, 1]) if isinstance(model, BertForSequenceClassification) else ids,
    }


def loss_and_gradients(model, batch, seed=3):
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def assert_same_bits(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@on_every_model
def test_gradient_checkpointing_is_bit_identical(make):
    model = make()
    batch = batch_for(model)
    plain = loss_and_gradients(model, batch)
    layers = model.transformer.h if hasattr(model, "transformer") else model.bert.encoder.layer
    calls = []
    layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    assert_same_bits(plain, loss_and_gradients(model, batch))
    assert len(calls) == 2  # once in forward, once in backward
    model.gradient_checkpointing_disable()
    assert_same_bits(plain, loss_and_gradients(model, batch))
    assert len(calls) == 3


def test_gradient_checkpointing_recomputes_on_the_same_backend():
    model = MODELS["GPT-2"]()
    batch = batch_for(model)
    with fastlm.use_backend("reference"):
        plain = loss_and_gradients(model, batch)
        model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model.zero_grad(set_to_none=True)
        loss = model(**batch).loss
    loss.backward()  # outside use_backend
    assert_same_bits(plain, [loss, *(p.grad for p in model.parameters())])


@on_every_model
def test_gradient_checkpointing_is_inactive_in_evaluation_mode(make):
    model = make().eval()
    model.gradient_checkpointing_enable()
    calls = []
    (model.transformer.h if hasattr(model, "transformer") else model.bert.encoder.layer)[0].register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    loss_and_gradients(model, batch_for(model))
    assert len(calls) == 1


@on_every_model
def test_recompute_levels_have_the_same_gradients(make, monkeypatch):
    model = make()
    layers = model.transformer.h if hasattr(model, "transformer") else model.bert.encoder.layer
    seen = []

    def recording_gelu_mlp(*args, recompute, **settings):
        seen.append(recompute)
        return fastlm.gelu_mlp(*args, recompute=recompute, **settings)

    for module in (gpt2, encoder_layer):
        monkeypatch.setattr(module, "gelu_mlp", recording_gelu_mlp)
    batch = batch_for(model)
    assert model.recompute == 1
    with fastlm.use_backend("reference"):
        expected = loss_and_gradients(model, batch)
        for level in (0, 2):
            model.recompute = level
            assert model.recompute == level == getattr(model, model.base_model_prefix).recompute
            assert_same_bits(expected, loss_and_gradients(model, batch))
    assert seen == [1] * len(layers) + [0] * len(layers) + [2] * len(layers)
    assert copy.deepcopy(model).recompute == pickle.loads(pickle.dumps(model)).recompute == 2
    with pytest.raises(ValueError, match=r"recompute: expected one of 0, 1, 2, got 3"):
        model.recompute = 3
    assert "recompute" not in model.config.to_dict()


@pytest.mark.parametrize("level, saved_per_unit", [(0, 16), (1, 12), (2, 8)])
@pytest.mark.parametrize("kind", ["GPT-2", "BERT"])
def test_memory_saved_for_backward(kind, level, saved_per_unit):
    """Per token: `saved_per_unit` values per unit of width, the statistics of two norms and of each head's softmax."""

    def saved(layers):
        torch.manual_seed(0)
        sizes = {"vocab_size": 50} | dict.fromkeys(
            ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0
        )
        model = (
            GPT2LMHeadModel(
                GPT2Config.from_dict(
                    sizes | {"n_layer": layers, "n_embd": WIDTH, "n_head": HEADS, "n_positions": TOKENS}
                )
            )
            if kind == "GPT-2"
            else BertForMaskedLM(
                BertConfig.from_dict(
                    sizes
                    | {
                        "num_hidden_layers": layers,
                        "hidden_size": WIDTH,
                        "num_attention_heads": HEADS,
                        "intermediate_size": 4 * WIDTH,
                    }
                )
            )
        )
        model.recompute = level
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held = {}  # by address; holding the tensors keeps addresses unique
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (held.setdefault(x.untyped_storage().data_ptr(), x), x)[1], lambda x: x
        ):
            ids = torch.randint(50, (2, TOKENS))
            loss = model.train()(ids, labels=ids).loss
        assert loss.requires_grad
        return sum(x.untyped_storage().nbytes() for address, x in held.items() if address not in parameters)

    WIDTH, HEADS, TOKENS = 32, 4, 16
    assert saved(3) - saved(2) == 2 * TOKENS * 4 * (saved_per_unit * WIDTH + 4 + HEADS)


@on_every_model
def test_copies_compute_the_same_and_stay_tied(make):
    model = make()
    batch = batch_for(model)
    expected = loss_and_gradients(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(expected, loss_and_gradients(other, batch))
        assert len(list(other.parameters())) == len(list(model.parameters()))
        assert other.config == model.config and other.config is not model.config


@on_every_model
def test_state_dict_round_trip(make):
    model = make()
    other = type(model)(model.config)
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    batch = batch_for(model)
    assert_same_bits(loss_and_gradients(model, batch), loss_and_gradients(other.train(), batch))


def test_tied_parameters_are_the_same_tensor():
    model = ours_like(tiny_gpt2())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert (
        model.num_parameters()
        == sum(p.numel() for p in set(model.parameters()))
        < sum(t.numel() for t in model.state_dict().values())
    )
    masked_lm = ours_like(tiny_bert())
    assert masked_lm.cls.predictions.decoder.weight is masked_lm.bert.embeddings.word_embeddings.weight
    assert masked_lm.cls.predictions.decoder.bias is masked_lm.cls.predictions.bias
    for untied in (
        ours_like(tiny_gpt2(tie_word_embeddings=False)).lm_head,
        ours_like(tiny_bert(tie_word_embeddings=False)).cls.predictions.decoder,
    ):
        assert not untied.weight.is_meta and untied.weight.std() > 0


@pytest.mark.parametrize(
    "make",
    [lambda: GPT2LMHeadModel(GPT2Config(**SMALL_GPT2)), lambda: BertForMaskedLM(BertConfig(**SMALL_BERT))],
    ids=["GPT-2", "BERT"],
)
def test_bfloat16_by_default_dtype_and_by_conversion(make):
    torch.set_default_dtype(torch.bfloat16)
    try:
        constructed = make()
    finally:
        torch.set_default_dtype(torch.float32)
    converted = make().to(torch.bfloat16)
    ids = torch.randint(0, 131, (2, 9))
    for model in (constructed, converted):
        assert (
            {p.dtype for p in model.parameters()} == {torch.bfloat16}
            and model.dtype == torch.bfloat16
            and model.device.type == "cpu"
        )
        assert (
            0.5 * 0.02
            < (
                model.transformer.wte if hasattr(model, "transformer") else model.bert.embeddings.word_embeddings
            ).weight.std()
            < 2 * 0.02
        )
        model.train()(ids, labels=ids).loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.dtype == torch.bfloat16 for p in model.parameters())


SMALL_GPT2 = {"vocab_size": 131, "n_positions": 48, "n_embd": 36, "n_layer": 2, "n_head": 3}
SMALL_BERT = {
    "vocab_size": 131,
    "max_position_embeddings": 48,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: ours_like(tiny_gpt2(n_layer=2)), id="GPT-2"),
        pytest.param(lambda: ours_like(tiny_bert(num_hidden_layers=2)), id="BERT", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.slow
def test_compiles_to_a_single_graph(make):
    model = make().train()
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    ids = torch.randint(0, 131, (2, 9))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~mask, -100)}
    expected = loss_and_gradients(model, batch)
    compiled = torch.compile(model, fullgraph=True)
    for a, b in zip(expected, loss_and_gradients(compiled, batch), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    compiled.eval()
    torch.testing.assert_close(compiled(**batch).logits[mask], model(**batch).logits[mask], rtol=1e-4, atol=1e-5)


@on_every_model
def test_no_layout_copies(make):
    """The kernels take the strides of queries, keys, values and all gradients."""
    model = make()
    batch = batch_for(model) | {"attention_mask": torch.tensor([[1] * 9, [1] * 4 + [0] * 5])}
    before = fastlm.info().copies
    loss_and_gradients(model, batch)
    model.eval()(**batch)
    if hasattr(model, "generate"):
        model.generate(batch["input_ids"], max_new_tokens=5)
    assert fastlm.info().copies == before


def test_flop_counter():
    """2 FLOPs per weight and token in forward, twice that in backward, and the two products of attention."""
    model, ids = ours_like(tiny_gpt2()).train(), torch.randint(0, 131, (2, 9))
    with FlopCounterMode(display=False) as forward:
        loss = model(ids, labels=ids).loss
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name)
    assert forward.get_total_flops() >= 2 * weights * ids.numel()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert backward.get_total_flops() >= 4 * (weights - model.lm_head.weight.numel()) * ids.numel()


def test_config_of_another_class_is_an_error():
    with pytest.raises(TypeError, match="config: expected a GPT2Config, got BertConfig"):
        GPT2LMHeadModel(BertConfig())


def test_concurrent_forward_passes():
    """No state is shared: results equal those of sequential calls."""
    from concurrent.futures import ThreadPoolExecutor

    model = MODELS["GPT-2"]().eval()
    batches = [torch.randint(0, 131, (2, n)) for n in range(1, 20)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        sequential = [model(ids).logits for ids in batches]
        concurrent = list(pool.map(lambda ids: model(ids).logits.detach(), batches))
    assert_same_bits(sequential, concurrent)
