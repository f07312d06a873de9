import copy
import dataclasses
import json
import pickle

import pytest
import torch
import transformers

from fastlm import models
from fastlm.benchmarking.accuracy import KeepFloat64
from fastlm.models import Encoder, EncoderConfig, EncoderForMaskedLM, EncoderModel, load_model
from fastlm.models.encoder import CLASSES
from fastlm.models.encoder_config import BY_MODEL_TYPE
from tests.models.hugging_face import (
    DRAWS,
    ENCODERS,
    Errors,
    assert_within_twice_theirs,
    encoder_like,
    errors_of,
    gradients_of,
    tiny_encoder,
)

DTYPES = [torch.float32, torch.bfloat16]
WITH_HEADS = [family for family in ENCODERS if family != "Gemma3Text"]
SUFFIXES = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"]
POOLINGS = {"ModernBert": ["cls", "mean"], "EuroBert": ["bos", "mean", "late"]}
VARIANTS = {
    "biases and tanh GELU": (
        "ModernBert",
        {
            **dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True),
            "hidden_activation": "gelu_pytorch_tanh",
            "classifier_activation": "silu",
            "decoder_bias": False,
        },
    ),
    "every layer is local": ("ModernBert", {"layer_types": ["sliding_attention"] * 3, "local_attention": 5}),
    "untied projection": ("ModernBert", {"tie_word_embeddings": False}),
    "untied BERT": ("Bert", {"tie_word_embeddings": False, "hidden_act": "gelu_new"}),
    "no padding token": ("DistilBert", {"pad_token_id": None}),
    "embeddings of the layers' width": ("Electra", {"embedding_size": 48}),
    "no token types": ("Gte", {"type_vocab_size": 0}),
    "two token types": ("Gte", {"type_vocab_size": 2, "hidden_act": "silu"}),
    "scaled positions": (
        "NomicBert",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}},
    ),
    "biases and tied projection": (
        "EuroBert",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"},
    ),
}
# Between them they have every kind of layer and embedding; tests of the others repeat these.
DISTINCT = ["ModernBert", "Bert", "Gte", "EuroBert", "Gemma3Text"]


def mostly_slow(*found, distinct=DISTINCT):
    """Cases of which only some are in the quick tests."""
    return [pytest.param(*case, marks=() if case[0] in distinct else pytest.mark.slow) for case in found]


families = pytest.mark.parametrize("family", mostly_slow(*((family,) for family in ENCODERS)))
families_with_heads = pytest.mark.parametrize("family", mostly_slow(*((family,) for family in WITH_HEADS)))


def assert_close_to_exact(make, draw, dtype=torch.float32, draws=DRAWS):
    assert_within_twice_theirs(make, draw, dtype, draws=draws, exact_attention="sdpa", convert=encoder_like)


def tokens(*shape, vocab=131):
    """No padding tokens: RoBERTa's positions skip them."""
    return torch.randint(4, vocab, shape)


RIGHT = torch.arange(17) < torch.tensor([[17], [12], [1]])
LEFT = torch.arange(17) >= torch.tensor([[0], [5], [16]])
HOLES = RIGHT & (torch.arange(17) % 5 != 2)


def masked(mask):
    """Half of the real tokens are labelled."""

    def draw():
        ids = tokens(*mask.shape)
        labels = tokens(*mask.shape).masked_fill(~mask | (torch.rand(mask.shape) < 0.5), -100)
        labels[0, 0] = 7
        return {"input_ids": ids, "attention_mask": mask.long()}, labels, mask

    return draw


def plain():
    return {"input_ids": tokens(2, 17)}, tokens(2, 17), ...


def embeddings(width):
    return lambda: ({"inputs_embeds": torch.randn(2, 17, width)}, tokens(2, 17), ...)


@pytest.mark.parametrize(
    "family, dtype",
    [(family, torch.float32) for family in WITH_HEADS]
    + mostly_slow(*((family, torch.bfloat16) for family in WITH_HEADS)),
    ids=str,
)
def test_logits_loss_and_gradients(family, dtype):
    assert_close_to_exact(lambda: tiny_encoder(family), masked(RIGHT), dtype)


@families_with_heads
@pytest.mark.parametrize("draw", [masked(LEFT), masked(HOLES), plain], ids=["left", "holes", "no padding"])
def test_padding(family, draw):
    assert_close_to_exact(lambda: tiny_encoder(family), draw)


@families_with_heads
def test_embeddings(family):
    draw = embeddings(20 if family == "Electra" else 48)
    assert_close_to_exact(lambda: tiny_encoder(family), draw)


@pytest.mark.slow
@pytest.mark.parametrize("family, changes", VARIANTS.values(), ids=VARIANTS)
def test_variants(family, changes):
    assert_close_to_exact(lambda: tiny_encoder(family, **changes), masked(RIGHT))


def types_and_positions():
    inputs, labels, where = masked(RIGHT)()
    more = {"token_type_ids": torch.randint(2, (3, 17)), "position_ids": torch.randperm(48)[:17].expand(3, -1)}
    return inputs | more, labels, where


@pytest.mark.parametrize("family", mostly_slow(("Bert",), ("Roberta",), ("Electra",), ("Gte",)))
def test_token_types_and_positions(family):
    assert_close_to_exact(lambda: tiny_encoder(family, type_vocab_size=2), types_and_positions)


def hidden_results(model, inputs, where):
    """Hidden states of real tokens, pooled outputs, and the gradients of a loss of both."""
    output = model(**inputs)
    results = {"hidden": output.last_hidden_state[where]}
    if getattr(output, "pooler_output", None) is not None:
        results["pooled"] = output.pooler_output
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for x in results.values():
        loss = loss + (x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum()
    return {**{name: x.detach() for name, x in results.items()}, **gradients_of(model, loss)}


@families
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [RIGHT, pytest.param(LEFT, marks=pytest.mark.slow)], ids=["right", "left"])
def test_hidden_states(family, dtype, mask):
    if mask is LEFT and family in ("Bert", "Roberta", "XLMRoberta", "MPNet", "JinaEmbeddingsV3"):
        pytest.skip("its pooler in transformers reads padding")
    errors = Errors(dtype)
    for _ in range(DRAWS):
        theirs, (inputs, _, where) = tiny_encoder(family, "Model").to(dtype), masked(mask)()
        exact_model = copy.deepcopy(theirs).double()
        exact_model.set_attn_implementation("sdpa")
        with KeepFloat64():
            exact = hidden_results(exact_model, inputs, where)
        baseline = errors_of(hidden_results(theirs, inputs, where), exact)
        errors.add(errors_of(hidden_results(encoder_like(theirs), inputs, where), exact), baseline)
    errors.judge()


def classified(model, inputs, labels):
    output = model(**inputs, labels=labels)
    logits = {} if output.logits is None else {"logits": output.logits.detach()}
    return {**logits, "loss": output.loss.detach(), **gradients_of(model, output.loss)}


@pytest.mark.parametrize(
    "family, changes",
    mostly_slow(
        *((family, {}) for family in WITH_HEADS if family not in POOLINGS),
        *((family, {"classifier_pooling": pooling}) for family, found in POOLINGS.items() for pooling in found),
        distinct=[*DISTINCT, "Roberta", "DistilBert"],
    ),
    ids=str,
)
def test_sequence_classification(family, changes):
    evaluated, trained = Errors(torch.float32), Errors(torch.float32)
    kinds = [{}, {}, {}, *([{"problem_type": "multi_label_classification"}] * 3)]
    for kind in kinds:
        theirs = tiny_encoder(family, "ForSequenceClassification", num_labels=5, **changes, **kind)
        inputs, ours = masked(RIGHT)()[0], encoder_like(theirs)
        labels = torch.rand(3, 5).round() if "problem_type" in kind else torch.randint(5, (3,))
        baseline = classified(theirs, inputs, labels)
        exact = classified(theirs.double(), inputs, labels.double() if labels.is_floating_point() else labels)
        evaluation, training = classified(ours, inputs, labels), classified(ours.train(), inputs, labels)
        # Not by the 2 × rule: rounding errors may cancel in a single number.
        losses = [results.pop("loss") for results in (baseline, exact, evaluation, training)]
        for loss in losses[2:]:
            torch.testing.assert_close(loss, losses[1].float())
        baseline = errors_of(baseline, exact)
        evaluated.add(errors_of(evaluation, exact), baseline)
        assert ("logits" in training) == labels.is_floating_point()
        trained.add(errors_of(training, exact), {name: error for name, error in baseline.items() if name in training})
    evaluated.judge()
    trained.judge()


@families_with_heads
def test_token_classification(family):
    def draw():
        inputs, labels, where = masked(RIGHT)()
        return inputs, labels.where(labels == -100, labels % 5), where

    assert_close_to_exact(lambda: tiny_encoder(family, "ForTokenClassification", num_labels=5), draw)


@pytest.mark.parametrize("suffix", ["Model", "ForSequenceClassification"])
@families_with_heads
def test_padding_side_changes_nothing(family, suffix):
    """Positions are given, and the first token of a sequence is its first real one."""
    ours, ids = encoder_like(tiny_encoder(family, suffix)), tokens(3, 17)
    lengths = RIGHT.sum(1).tolist()
    left = torch.stack([row.roll(17 - length) for row, length in zip(ids, lengths, strict=True)])
    positions = [(torch.arange(17) + 2).roll(17 - length) for length in lengths]
    first = ours(ids, RIGHT.long(), position_ids=torch.arange(2, 19)[None])
    second = ours(left, LEFT.long(), position_ids=torch.stack(positions))
    if suffix == "Model":
        torch.testing.assert_close(second.last_hidden_state[LEFT], first.last_hidden_state[RIGHT])
        first, second = first.pooler_output, second.pooler_output
    else:
        first, second = first.logits, second.logits
    if first is not None:
        torch.testing.assert_close(second, first)


@families
@pytest.mark.parametrize("mask", [RIGHT, LEFT, HOLES, None], ids=["right", "left", "holes", "no padding"])
def test_packed_rows(family, mask):
    """They are those of the real tokens, and of the padded result the rest is 0."""
    ours, ids = encoder_like(tiny_encoder(family, "Model")), tokens(3, 17)
    output, (rows, ends) = ours(ids, mask).last_hidden_state, ours.encode_packed(ids, mask)
    where = torch.ones(3, 17, dtype=torch.bool) if mask is None else mask
    assert torch.equal(output[where], rows) and not output[~where].any()
    assert ends.dtype == torch.int32 and ends.tolist() == [0, *where.sum(1).cumsum(0).tolist()]
    direction = torch.randn_like(rows)
    expected = torch.autograd.grad((output[where] * direction).sum(), [*ours.parameters()], allow_unused=True)
    found = torch.autograd.grad((rows * direction).sum(), [*ours.parameters()], allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["ModernBert", "Bert"])
def test_layers_run_on_real_tokens_alone(family):
    ours, seen = encoder_like(tiny_encoder(family, "ForSequenceClassification")), []
    for module in ours.modules():
        if type(module) is models.layers.Linear:
            module.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[:-1])))
    ours(tokens(3, 17), RIGHT)
    assert set(seen) == {(1, 30), (3,)}


def test_what_stands_at_padding_has_no_effect():
    ours = encoder_like(tiny_encoder("ModernBert"))
    (inputs, labels, where), other = masked(RIGHT)(), tokens(3, 17)
    changed = inputs | {"input_ids": inputs["input_ids"].where(where, other)}
    for model in (ours, ours.train()):
        first, second = model(**inputs, labels=labels), model(**changed, labels=labels.where(where, other))
        assert torch.equal(first.loss, second.loss)


@pytest.mark.parametrize("family", ENCODERS)
def test_checkpoints_round_trip(family, tmp_path):
    for suffix in SUFFIXES if family != "Gemma3Text" else ["Model"]:
        theirs, ids = tiny_encoder(family, suffix), tokens(2, 17)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = Encoder.from_pretrained(tmp_path / "theirs")
        assert ours.architecture == type(theirs).__name__ and not ours.training
        ours.save_pretrained(tmp_path / "ours")
        again = type(theirs).from_pretrained(tmp_path / "ours")
        torch.testing.assert_close(again(ids)[0], theirs(ids)[0], rtol=0, atol=0)
        assert torch.equal(Encoder.from_pretrained(tmp_path / "ours")(ids)[0], ours(ids)[0])
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        if family != "Bert" or suffix == "ForTokenClassification":
            assert type(load_model(tmp_path / "theirs")) is type(ours)


def test_settings_of_transformers_4(tmp_path):
    """ModernBERT's bases of positions and pattern of layers."""
    theirs, ids = tiny_encoder("ModernBert", global_attn_every_n_layers=2), tokens(1, 17)
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_parameters", "layer_types"):
        settings.pop(name, None)
    settings |= {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "global_attn_every_n_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    torch.testing.assert_close(Encoder.from_pretrained(tmp_path)(ids).logits, theirs(ids).logits)


def test_heads_other_than_that_of_the_file(tmp_path):
    theirs = tiny_encoder("ModernBert")
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="not loaded, as EncoderModel has no such parameter: .*head.dense.weight"):
        plain = EncoderModel.from_pretrained(tmp_path)
    assert torch.equal(plain.layers[1].attn.Wqkv.weight, theirs.model.layers[1].attn.Wqkv.weight)
    plain.save_pretrained(tmp_path / "plain")
    initialise = ("head", "classifier")
    classifier = models.EncoderForSequenceClassification.from_pretrained(tmp_path / "plain", initialise=initialise)
    assert torch.equal(classifier.base_model.final_norm.weight, plain.final_norm.weight)
    assert classifier(tokens(2, 5)).logits.shape == (2, 2)


def test_no_architectures_is_no_head(tmp_path):
    tiny_encoder("Electra", "Model").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert type(Encoder.from_pretrained(tmp_path)) is EncoderModel is type(load_model(tmp_path))


@pytest.mark.parametrize("config", BY_MODEL_TYPE.values(), ids=BY_MODEL_TYPE)
def test_defaults_equal_hugging_faces(config):
    name = f"{config.family}Config"
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    own, theirs = config(), getattr(transformers, name)()
    derived = "other", "layer_types", "rope_parameters", "head_dim", "use_bidirectional_attention"
    for field in dataclasses.fields(config):
        if field.name not in derived and hasattr(theirs, field.name):
            assert getattr(own, field.name) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize("family", ["ModernBert", "Gte", "DistilBert", "Electra"])
def test_dropout(family):
    """Each probability has an effect in training alone, and the gradients have no NaN."""
    names = [f.name for f in dataclasses.fields(CONFIGS[family]) if f.name.endswith(("dropout", "dropout_prob"))]
    for suffix in ("ForTokenClassification", "ForSequenceClassification"):
        for name in names:
            if (suffix, name) in UNUSED.get(family, ()):
                continue
            ours = encoder_like(tiny_encoder(family, suffix, **{name: 0.5}))
            ids = tokens(3, 17)
            assert torch.equal(ours(ids, RIGHT).logits, ours(ids, RIGHT).logits)
            ours.train()
            first, second = ours(ids, RIGHT).logits, ours(ids, RIGHT).logits
            assert not torch.equal(first, second), name
            first.square().sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


CONFIGS = {config.family: config for config in BY_MODEL_TYPE.values()}
UNUSED = {"DistilBert": [("ForTokenClassification", "seq_classif_dropout")]}


@pytest.mark.parametrize("name", ["attention_dropout", "embedding_dropout", "mlp_dropout"])
def test_dropout_statistics_equal_hugging_faces(name):
    theirs = tiny_encoder("ModernBert", "Model", num_hidden_layers=2, **{name: 0.5}).train()
    ours, ids = encoder_like(theirs).train(), tokens(1, 6)
    with torch.no_grad():
        batch = ids.expand(3000, -1)  # every row has its own masks
        own, other = ours(batch).last_hidden_state, theirs(batch).last_hidden_state
    spread = other.std(0)
    assert spread.min() > 0.01
    torch.testing.assert_close(own.std(0), spread, rtol=0.15, atol=0.0)
    five_standard_errors = 5 * (2 / 3000) ** 0.5  # of the difference
    assert ((own.mean(0) - other.mean(0)) / spread).abs().max() < five_standard_errors


@families_with_heads
def test_autocast(family):
    theirs, (inputs, labels, where) = tiny_encoder(family), masked(RIGHT)()
    ours = encoder_like(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    truth = theirs.double()(**inputs).logits
    assert mine.logits.dtype == other.logits.dtype
    assert (mine.logits - truth)[where].norm() <= 2 * (other.logits - truth)[where].norm()
    mine.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", ["ModernBert", "Gte", "EuroBert"])
def test_recomputation_and_checkpointing_keep_the_gradients(family):
    ours, (inputs, labels, _) = encoder_like(tiny_encoder(family)).train(), masked(RIGHT)()

    def gradients():
        return gradients_of(ours, ours(**inputs, labels=labels).loss)

    expected = gradients()
    for level in (0, 2):
        ours.recompute = level
        torch.testing.assert_close(gradients(), expected)
    ours.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family, suffix", [("ModernBert", "ForMaskedLM"), ("Bert", "ForSequenceClassification")])
def test_compiles_to_a_single_graph(family, suffix):
    """With padding: no size may depend on the values of a mask."""
    ours = encoder_like(tiny_encoder(family, suffix)).train()
    inputs, labels, _ = masked(LEFT)()
    labels = labels if suffix == "ForMaskedLM" else torch.tensor([0, 1, 1])
    expected_loss = ours(**inputs, labels=labels).loss
    expected = gradients_of(ours, expected_loss)
    loss = torch.compile(ours, fullgraph=True)(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradients_of(ours, loss), expected, rtol=1e-4, atol=1e-5)


def test_copies_compute_the_same_and_stay_tied():
    ours, (inputs, labels, _) = encoder_like(tiny_encoder("Bert")), masked(RIGHT)()
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied(**inputs, labels=labels).loss, ours(**inputs, labels=labels).loss)
        predictions = copied.cls.predictions
        assert predictions.decoder.weight is copied.bert.embeddings.word_embeddings.weight
        assert predictions.decoder.bias is predictions.bias


def test_a_module_that_is_replaced_is_called():
    ours, ids = encoder_like(tiny_encoder("ModernBert")), tokens(2, 9)
    before = ours(ids).logits
    ours.model.layers[2].attn.Wo = torch.nn.Sequential(ours.model.layers[2].attn.Wo)
    assert torch.equal(ours(ids).logits, before)
    ours.model.layers[2].attn.Wo.append(torch.nn.Dropout(0.5))
    assert not torch.equal(ours.train()(ids).logits, before)


@pytest.mark.parametrize("config", BY_MODEL_TYPE.values(), ids=BY_MODEL_TYPE)
def test_initialisation(config):
    """Every parameter is set, by the distribution of transformers."""
    name = f"{config.family}Config"
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    for suffix in SUFFIXES if config.heads else ["Model"]:
        theirs = tiny_encoder(config.family, suffix, initializer_range=0.03)
        theirs = type(theirs)(theirs.config)
        settings = EncoderConfig.from_dict(theirs.config.to_dict())
        ours = {c.suffix: c for c in CLASSES}[suffix](settings)
        expected = dict(theirs.named_parameters(remove_duplicate=False))
        for parameter, own in ours.named_parameters():
            other = expected[parameter]
            if other.numel() == 1 or other.std() == 0:
                assert torch.equal(own, other), parameter
            else:
                # 6 standard errors: σ/√(2n) of each of two estimated standard deviations, σ/√n of each mean
                assert abs(own.std() / other.std() - 1) < 6 / own.numel() ** 0.5, parameter
                assert abs(own.mean() - other.mean()) < 9 * other.std() / own.numel() ** 0.5, parameter


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(tokens(2, 5) + 131), r"input_ids: expected values in \[0, 131\), got \d+"),
        (lambda m: m(tokens(2, 49)), r"input_ids: expected at most 48 tokens, the context of the model, got 49"),
        (
            lambda m: m(tokens(2, 5), torch.ones(2, 4)),
            r"attention_mask: expected shape \(2, 5\): one value per token.*, got \(2, 4\)",
        ),
        (
            lambda m: m(tokens(3, 5), torch.tensor([[1] * 5, [0] * 5, [1] * 5])),
            r"attention_mask: expected at least one real token in every row, got none in row 1",
        ),
        (
            lambda m: m(tokens(2, 5), token_type_ids=torch.zeros(2, 5, dtype=torch.int64)),
            r"token_type_ids: expected None, as modernbert has no token types, got a tensor",
        ),
        (
            lambda m: m(tokens(2, 5), position_ids=torch.full((2, 5), 48)),
            r"position_ids: expected values in \[0, 48\), got 48",
        ),
        (
            lambda m: m(tokens(2, 5), labels=tokens(2, 5) + 131),
            r"labels: expected values in \[0, 131\) or -100, got \d+",
        ),
        (
            lambda m: m(tokens(2, 5), labels=tokens(2)),
            r"labels: expected shape \(2, 5\), as input_ids or inputs_embeds, got \(2,\)",
        ),
    ],
)
def test_errors(call, message):
    ours = encoder_like(tiny_encoder("ModernBert"))
    for model in (ours, ours.train()):
        with pytest.raises(ValueError, match=message):
            call(model)


def test_context_of_roberta():
    """Positions begin after pad_token_id."""
    ours = encoder_like(tiny_encoder("Roberta"))
    assert ours(tokens(1, 48)).logits.shape == (1, 48, 131)
    with pytest.raises(ValueError, match="input_ids: expected at most 48 tokens, the context of the model, got 49"):
        ours(tokens(1, 49))


def test_distances_of_mpnet_in_long_texts():
    """Up to beyond the distance from which all are one."""
    theirs, ids = tiny_encoder("MPNet", "Model", max_position_embeddings=402), tokens(1, 400)
    torch.testing.assert_close(encoder_like(theirs)(ids)[0], theirs(ids)[0], rtol=1e-4, atol=1e-5)


SIZES = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_type": "modernbart"}, "model_type: expected one of bert, .*, got 'modernbart'; did you mean"),
        ({"model_type": "albert"}, "model_type: expected one of bert, .*, got 'albert'"),
        ({"model_type": "mpnet", "pad_token_id": 0}, "pad_token_id: expected 1, the only supported value, got 0"),
        ({"hidden_activation": "relu6"}, "hidden_activation: expected one of silu, .*, got 'relu6'"),
        ({"hidden_size": 50}, "hidden_size: expected a multiple of num_attention_heads = 4, got 50"),
        (
            {"layer_types": ["full_attention"]},
            "layer_types: expected num_hidden_layers = 2 of full_attention, sliding_attention, got",
        ),
        ({"sparse_pred_ignore_index": 0}, "sparse_pred_ignore_index: expected -100, the only supported value, got 0"),
        ({"local_attention": 0}, "local_attention: expected an integer >= 1, got 0"),
        ({"classifier_pooling": "max"}, "classifier_pooling: expected one of cls, mean, got 'max'"),
        ({"classifier_activation": "celu"}, "classifier_activation: expected one of gelu, .*, got 'celu'"),
        ({"mlp_dropout": 1.0}, r"mlp_dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: expected null, the only supported value, got"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "lineal"}}},
            "rope_type: expected one of .*, got 'lineal'",
        ),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters: expected settings for each of full_attention, "),
        ({"num_labels": 0}, "num_labels: expected an integer >= 1, got 0"),
        ({"pad_token_id": 10**6}, r"pad_token_id: expected a token id in \[0, 50368\), got 1000000"),
        ({"model_type": "bert", "hidden_act": "relu"}, "hidden_act: expected one of gelu, .*, got 'relu'"),
        ({"model_type": "bert", "is_decoder": True}, "is_decoder: expected False, the only supported value, got True"),
        ({"model_type": "bert", "type_vocab_size": 0}, "type_vocab_size: expected an integer >= 1, got 0"),
        ({"model_type": "distilbert", "dim": 50, "n_heads": 4}, "dim: expected a multiple of n_heads = 4, got 50"),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id: expected a token id, after which positions"),
        ({"model_type": "gte", "partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1 or null, got 0.5"),
        (
            {"model_type": "gemma3_text"},
            "use_bidirectional_attention: expected true; a causal model is a CausalLM, got None",
        ),
    ],
)
def test_settings_that_are_not_supported(settings, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig.from_dict({"model_type": "modernbert", **SIZES, **settings})


def test_heads_that_are_not_supported(tmp_path):
    tiny_encoder("ModernBert", "ForQuestionAnswering").save_pretrained(tmp_path)
    message = r"architectures: expected one of ModernBertModel, ModernBertForMaskedLM, .*, got ModernBertForQuestionA"
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(tmp_path)
    config = models.Gemma3EncoderConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(ValueError, match="config: expected one of a family with ForMaskedLM, got Gemma3Text, which"):
        EncoderForMaskedLM(config)
    with pytest.raises(TypeError, match=r"Encoder: expected one of its subclasses EncoderModel, .*, or Encoder.from_p"):
        Encoder(config)


def test_hidden_states_of_a_decoder():
    """An embedding model that pools the last token of a decoder, such as Qwen 3's."""
    theirs = models.CausalLM(
        models.Qwen3Config(
            vocab_size=131,
            num_hidden_layers=2,
            hidden_size=48,
            head_dim=16,
            intermediate_size=80,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=48,
        )
    ).eval()
    ids = tokens(3, 17)
    last = theirs.base_model(ids, attention_mask=LEFT).last_hidden_state[:, -1]
    for row, mask in zip(range(3), LEFT, strict=True):
        alone = theirs.base_model(ids[row : row + 1, mask]).last_hidden_state[0, -1]
        torch.testing.assert_close(last[row], alone)
