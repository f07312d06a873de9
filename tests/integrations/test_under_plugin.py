"""The checks of transformers' common model tests, on models that the pytest plugin accelerates at construction."""

import inspect

import pytest
import torch
import transformers
from torch import nn

import fastlm
from fastlm.integrations import pytest_plugin
from tests.integrations.support import SETTINGS, V5, VOCAB, ids, language_head, padded, tiny

FAMILIES = ("GPT2", "Bert", "Roberta", "DistilBert", "Electra", "Qwen3", "ModernBert")
LAYERS, HEADS, WIDTH = 2, 3, 36
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def plugin(monkeypatch):
    """As with FASTLM_ACCELERATE=1, undone after every test."""
    monkeypatch.setattr(transformers.PreTrainedModel, "post_init", transformers.PreTrainedModel.post_init)
    pytest_plugin.accelerate_after_construction()


def heads_of(family):
    return ("Model", language_head(family), "ForSequenceClassification", "ForTokenClassification")


def class_and_config(family, head, **changes):
    settings = {**SETTINGS[family], **({"num_hidden_layers": LAYERS} if family == "ModernBert" else {}), **changes}
    return getattr(transformers, f"{family}{head}"), getattr(transformers, f"{family}Config")(**settings)


def batch_of(head, tokens=9):
    x, mask = padded(tokens, 5, tokens=tokens)
    batch = {"input_ids": x, "attention_mask": mask}
    if head == "ForSequenceClassification":
        batch["labels"] = torch.tensor([0, 1])
    elif head == "ForTokenClassification":
        batch["labels"] = x % 2
    elif head != "Model":
        batch["labels"] = x.masked_fill(mask == 0, -100)
    return batch


def unlabelled(batch):
    return {name: x for name, x in batch.items() if name != "labels"}


def assert_accelerated(model):
    assert fastlm.report(model).replaced


@each_family
def test_attention_outputs(family):
    """Requested by the call or by the configuration, with and without hidden states, in eval and training mode."""
    for head in heads_of(family):
        kind, config = class_and_config(family, head)
        batch = batch_of(head)
        for training in (False, True):
            model = kind._from_config(config, attn_implementation="eager").train(training)
            assert_accelerated(model)
            with torch.no_grad():
                plain = model(**unlabelled(batch))
                output = model(**unlabelled(batch), output_attentions=True)
            assert [a.shape for a in output.attentions] == [(2, HEADS, 9, 9)] * LAYERS
            assert {*output} - {*plain} <= {"attentions", "cross_attentions"}
            torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, HEADS, 9))
            with torch.no_grad():
                both = model(**unlabelled(batch), output_attentions=True, output_hidden_states=True)
            assert (
                len(both) == len(output) + 1
                and len(both.hidden_states) == LAYERS + 1
                and len(both.attentions) == LAYERS
            )
        config = class_and_config(family, head, output_attentions=True, attn_implementation="eager")[1]
        assert len(kind(config).eval()(**unlabelled(batch)).attentions) == LAYERS


@each_family
def test_hidden_states_output(family):
    for head in heads_of(family):
        batch = unlabelled(batch_of(head))
        kind, config = class_and_config(family, head)
        from_call = kind(config).eval()(**batch, output_hidden_states=True).hidden_states
        from_config = kind(class_and_config(family, head, output_hidden_states=True)[1]).eval()(**batch).hidden_states
        for states in (from_call, from_config):
            assert [state.shape for state in states] == [(2, 9, WIDTH)] * (LAYERS + 1)


@each_family
def test_gradients_reach_hidden_states_and_attentions(family):
    kind, config = class_and_config(
        family, "Model", output_hidden_states=True, output_attentions=True, attn_implementation="eager"
    )
    output = kind(config)(**unlabelled(batch_of("Model")))
    retained = output.hidden_states[0], output.hidden_states[-2], output.attentions[0]
    for x in retained:
        x.retain_grad()
    output[0].flatten()[0].backward(retain_graph=True)
    assert all(x.grad is not None and x.grad.isfinite().all() for x in retained)


@each_family
def test_tuple_and_dictionary_outputs_are_equal(family):
    for head in heads_of(family):
        kind, config = class_and_config(family, head)
        model, batch = kind(config).eval(), batch_of(head)
        for extra in ({}, {"output_hidden_states": True}):
            if extra and family == "ModernBert" and not V5:  # its heads leave hidden states out of tuples there
                continue
            tuples, named = model(**batch, **extra, return_dict=False), model(**batch, **extra).to_tuple()
            assert len(tuples) == len(named)
            torch.testing.assert_close(flat(tuples), flat(named))


def flat(output):
    """All tensors of nested tuples, concatenated, without caches."""
    if isinstance(output, torch.Tensor):
        return output.detach().flatten()
    return torch.cat([flat(x) for x in output if isinstance(x, torch.Tensor | tuple)])


@pytest.mark.parametrize("settings", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
@each_family
def test_gradient_checkpointing(family, settings):
    """The same parameters have the same gradients with and without checkpointing."""
    for head in heads_of(family)[1:]:
        kind, config = class_and_config(family, head)
        model, batch = kind(config).train(), batch_of(head)
        found = []
        for on in (False, True):
            if on:
                model.gradient_checkpointing_enable(
                    **({} if settings is None else {"gradient_checkpointing_kwargs": settings})
                )
            assert model.is_gradient_checkpointing is on
            model.zero_grad()
            torch.manual_seed(1)  # classifiers have dropout
            model(**batch).loss.backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys() and found[0]
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient)
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing


@each_family
def test_save_load(family, tmp_path):
    for head in heads_of(family):
        kind, config = class_and_config(family, head)
        model, batch = kind(config).eval(), unlabelled(batch_of(head))
        model.save_pretrained(tmp_path / head)
        reloaded, loading = kind.from_pretrained(tmp_path / head, output_loading_info=True)
        assert_accelerated(reloaded)
        assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
        assert torch.equal(reloaded(**batch)[0], model(**batch)[0])
        half = kind.from_pretrained(tmp_path / head, dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16 and half(**batch)[0].dtype == torch.bfloat16
        torch.save(model.state_dict(), tmp_path / "state.pt")
        loaded = kind(config).eval()
        loaded.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert torch.equal(loaded(**batch)[0], model(**batch)[0])
    base = kind.base_model_prefix
    headless = getattr(transformers, f"{family}Model").from_pretrained(tmp_path / heads_of(family)[1])
    assert_accelerated(headless)
    assert base and headless(**batch)[0].shape == (2, 9, WIDTH)


@each_family
def test_resize_tokens_embeddings(family):
    for head in heads_of(family)[:2]:
        for tied in (True, False):
            kind, config = class_and_config(family, head, tie_word_embeddings=tied)
            model, batch = kind(config), batch_of(head)
            batch = unlabelled(batch) if head == "Model" else batch
            before = model.get_input_embeddings().weight.detach().clone()
            for size in (VOCAB + 10, VOCAB - 15):
                resized = model.resize_token_embeddings(size, mean_resizing=False)
                assert model.config.vocab_size == size == resized.weight.shape[0]
                retained = min(size, VOCAB)
                assert torch.equal(resized.weight[:retained], before[:retained])
                clipped = {name: x.clamp(max=size - 1) for name, x in batch.items()}
                assert model.eval()(**unlabelled(clipped))[0].shape[-1] == (WIDTH if head == "Model" else size)
                if head != "Model":
                    decoder = model.get_output_embeddings()
                    assert decoder.weight.shape[0] == size and (decoder.bias is None or decoder.bias.shape == (size,))
                    assert (decoder.weight is resized.weight) is tied
                    output = model.train()(**clipped)
                    output.loss.backward()
                    # The loss is fused with the new projection, too.
                    assert output.logits is None and resized.weight.grad is not None
                    model.zero_grad()
                    del output  # its graph refers to the weight of the old shape
            rounded_up = model.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False)
            assert rounded_up.weight.shape[0] % 64 == 0


@each_family
def test_tied_weights(family, tmp_path):
    kind, config = class_and_config(family, heads_of(family)[1], tie_word_embeddings=True)
    model = kind(config)
    embedding, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    assert decoder.weight is embedding.weight
    with torch.no_grad():
        decoder.weight.add_(1)
    assert torch.equal(decoder.weight, embedding.weight)
    model.save_pretrained(tmp_path)
    reloaded = kind.from_pretrained(tmp_path).eval()
    assert reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight
    model.set_output_embeddings(nn.Linear(decoder.in_features, VOCAB))  # a module without a patch
    model.train()(**batch_of("LM")).loss.backward()
    assert model.get_output_embeddings().weight.grad is not None


@each_family
def test_eager_matches_sdpa(family):
    """Both implementations compute the same, with padding on either side, and the one that was set can be read."""
    kind, config = class_and_config(family, "Model")
    model = kind(config).eval()
    x, mask = padded(9, 5, tokens=9)
    for where in (mask, mask.flip(1), None):
        found = []
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            found.append(model(x, attention_mask=where)[0])
        seen = slice(None) if where is None else where.bool()
        torch.testing.assert_close(found[0][seen], found[1][seen], **CLOSE)
    model.set_attn_implementation("eager")
    if V5 or family in ("GPT2", "Qwen3"):  # transformers 4 does not allow it for other families
        assert model.config._attn_implementation == "eager"


@each_family
def test_inputs_embeds(family):
    for head in heads_of(family)[:2]:
        kind, config = class_and_config(family, head)
        model, x = kind(config).eval(), ids(2, 7)
        embedded = model.get_input_embeddings()(x)
        torch.testing.assert_close(model(inputs_embeds=embedded)[0], model(x)[0], **CLOSE)
        model.enable_input_require_grads()
        model.train()(input_ids=x, **({} if head == "Model" else {"labels": x}))[0].sum().backward()
        model.disable_input_require_grads()


@each_family
def test_signature_determinism_and_training(family):
    for head in heads_of(family):
        kind, config = class_and_config(family, head)
        model, batch = kind(config), batch_of(head)
        assert next(iter(inspect.signature(model.forward).parameters)) == "input_ids"
        model.eval()
        assert torch.equal(model(**unlabelled(batch))[0], model(**unlabelled(batch))[0])
        if head != "Model":
            model.train()(**batch).loss.backward()
            missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
            assert not missing


@pytest.mark.parametrize(
    "problem, labels", [("regression", torch.rand(2, 1)), ("multi_label_classification", torch.ones(2, 2))]
)
@each_family
def test_problem_types(family, problem, labels):
    kind, config = class_and_config(
        family, "ForSequenceClassification", problem_type=problem, num_labels=labels.shape[1]
    )
    model = kind(config).train()
    loss = model(**{**batch_of("ForSequenceClassification"), "labels": labels}).loss
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "Electra"])
def test_feed_forward_chunking(family):
    """chunk_size_feed_forward splits the feed-forward block of transformers' layers; the result is the same."""
    model, x = tiny(family), ids(2, 7)
    chunked = type(model)(class_and_config(family, "Model", chunk_size_feed_forward=1)[1]).eval()
    chunked.load_state_dict(model.state_dict())
    torch.testing.assert_close(chunked(x)[0], model(x)[0], **CLOSE)


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 2}, {"do_sample": True}, {"cache_implementation": "static", "disable_compile": True}],
    ids=str,
)
def test_generate_with_left_padding(settings):
    kind, config = class_and_config("GPT2", "LMHeadModel")
    model = kind(config).eval()
    x, mask = padded(9, 5, tokens=9)
    torch.manual_seed(0)
    together = model.generate(
        x.flip(1), attention_mask=mask.flip(1), max_new_tokens=4, min_new_tokens=4, **{"do_sample": False, **settings}
    )
    assert together.shape == (2, 13)
    if "do_sample" not in settings:
        alone = model.generate(
            x.flip(1)[1:, 4:], max_new_tokens=4, min_new_tokens=4, **{"do_sample": False, **settings}
        )
        assert torch.equal(together[1, 9:], alone[0, 5:])


def test_meta_device(tmp_path):
    for family in FAMILIES:
        kind, config = class_and_config(family, "Model")
        with torch.device("meta"):
            model = kind(config).eval()
        x = torch.ones(2, 5, dtype=torch.int64, device="meta")
        if not V5 and family != "GPT2":  # they read values of the mask or of the ids, or use autocast
            continue
        output = model(x, attention_mask=x)
        assert output[0].shape == (2, 5, WIDTH) and output[0].is_meta
