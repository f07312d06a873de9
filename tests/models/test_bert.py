import pytest
import torch
import transformers

from fastlm.models import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel
from tests.models.hugging_face import (
    DRAWS,
    FLOOR,
    Errors,
    assert_within_twice_theirs,
    errors_of,
    gradients_of,
    ours_like,
    tiny_bert,
)

DTYPES = [torch.float32, torch.bfloat16]
VARIANTS = {
    "as published": {},
    "tanh GELU": {"hidden_act": "gelu_new"},
    "untied projection": {"tie_word_embeddings": False},
    "no padding token, one type, one head": {"pad_token_id": None, "type_vocab_size": 1, "num_attention_heads": 1},
    "large epsilon": {"layer_norm_eps": 1e-3},
}


def tokens(*shape, vocab=131):
    return torch.randint(0, vocab, shape)


def padded():
    """Three rows of 17, 12 and 1 real tokens; half of them are labelled."""
    mask = torch.arange(17) < torch.tensor([[17], [12], [1]])
    ids = tokens(3, 17).masked_fill(~mask, 0)
    labels = tokens(3, 17).masked_fill(~mask | (torch.rand(3, 17) < 0.5), -100)
    return {"input_ids": ids, "attention_mask": mask.long()}, labels, mask


def types_and_positions():
    inputs, labels, _ = padded()
    extra = {"token_type_ids": tokens(3, 17, vocab=2), "position_ids": torch.randperm(48)[:17].expand(3, -1)}
    return {"input_ids": inputs["input_ids"], **extra}, labels, ...


def embeddings():
    return {"inputs_embeds": torch.randn(3, 17, 36)}, padded()[1], ...


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_loss_and_gradients(changes, dtype):
    assert_within_twice_theirs(lambda: tiny_bert(**changes), padded, dtype)


def test_float16():
    assert_within_twice_theirs(tiny_bert, padded, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("draw", [types_and_positions, embeddings])
def test_inputs(draw, dtype):
    assert_within_twice_theirs(tiny_bert, draw, dtype)


@pytest.mark.slow
def test_bert_base():
    """110 million parameters, 40 tokens, every fourth is labelled."""

    def draw():
        ids = tokens(1, 40, vocab=30522)
        return {"input_ids": ids}, ids.masked_fill(torch.arange(40) % 4 > 0, -100), ...

    config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert_within_twice_theirs(lambda: transformers.BertForMaskedLM(config).eval(), draw, draws=1)


def test_single_layers():
    theirs = tiny_bert("BertModel")
    ours, x = ours_like(theirs), torch.randn(2, 11, 36)
    for own, layer in zip(ours.encoder.layer, theirs.encoder.layer, strict=True):
        torch.testing.assert_close(own(x)[0], layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooler(dtype):
    theirs = tiny_bert("BertModel").to(dtype)
    (inputs, _, where), ours = padded(), ours_like(theirs)
    mine, other = ours(**inputs), theirs(**inputs)
    truth = theirs.double()(**inputs)
    for name, at in (("last_hidden_state", where), ("pooler_output", ...)):
        own, baseline, exact = (output[name][at] for output in (mine, other, truth))
        assert (own - exact).norm() <= 2 * (baseline - exact).norm() + FLOOR[dtype] * exact.norm()
    assert mine.keys() == ("last_hidden_state", "pooler_output") and torch.equal(mine[1], mine.pooler_output)


def test_model_without_pooler():
    theirs = tiny_bert("BertForMaskedLM").bert
    ours = BertModel(BertConfig.from_dict(theirs.config.to_dict()), add_pooling_layer=False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours(tokens(2, 3)).pooler_output is None


@pytest.mark.parametrize(
    "changes, draw_labels",
    [
        ({"num_labels": 5}, lambda: tokens(3, vocab=5)),
        ({"num_labels": 5}, lambda: torch.rand(3, 5).round()),
        ({"num_labels": 1}, lambda: torch.randn(3)),
        ({"num_labels": 4, "problem_type": "regression"}, lambda: torch.randn(3, 4)),
    ],
    ids=["one class", "several labels", "regression", "multivariate regression"],
)
def test_classification(changes, draw_labels):
    evaluated, trained = Errors(torch.float32), Errors(torch.float32)
    for _ in range(DRAWS):
        theirs = tiny_bert("BertForSequenceClassification", **changes)
        inputs, labels, ours = padded()[0], draw_labels(), ours_like(theirs)
        baseline = classified(theirs, inputs, labels)
        exact = classified(theirs.double(), inputs, labels.double() if labels.is_floating_point() else labels)
        evaluation = classified(ours, inputs, labels)
        training = classified(ours.train(), inputs, labels)
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


def classified(model, inputs, labels):
    output = model(**inputs, labels=labels)
    logits = {} if output.logits is None else {"logits": output.logits.detach()}
    return {**logits, "loss": output.loss.detach(), **gradients_of(model, output.loss)}


@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_state_dict_keys_and_their_order(head):
    theirs = tiny_bert(head)
    assert list(ours_like(theirs).state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_statistics_equal_hugging_faces(name):
    theirs = tiny_bert("BertModel", num_hidden_layers=1, **{name: 0.5}).train()
    ours, ids = ours_like(theirs).train(), tokens(1, 6) + 0
    with torch.no_grad():
        batch = ids.expand(3000, -1)  # every row has its own masks
        own, other = ours(batch).last_hidden_state, theirs(batch).last_hidden_state
        assert torch.equal(ours.eval()(ids)[0], ours(ids)[0])
    spread = other.std(0)
    assert spread.min() > 0.01
    torch.testing.assert_close(own.std(0), spread, rtol=0.15, atol=0.0)
    five_standard_errors = 5 * (2 / 3000) ** 0.5  # of the difference
    assert ((own.mean(0) - other.mean(0)) / spread).abs().max() < five_standard_errors


def test_classifier_dropout():
    ours = ours_like(tiny_bert("BertForSequenceClassification", classifier_dropout=0.5)).train()
    ids = tokens(2, 7)
    assert not torch.equal(ours(ids).logits, ours(ids).logits)
    assert torch.equal(ours.eval()(ids).logits, ours(ids).logits)


def test_head_runs_on_labelled_positions_only():
    """Hidden states of unlabelled positions do not affect the loss; the head skips them."""
    ours, (inputs, labels, _) = ours_like(tiny_bert()).train(), padded()
    seen = []
    ours.cls.predictions.transform.dense.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].shape[0])
    )
    loss = ours(**inputs, labels=labels).loss
    assert seen == [(labels != -100).sum()]
    torch.testing.assert_close(loss, ours.eval()(**inputs, labels=labels).loss)


def test_fully_padded_row():
    ours, ids = ours_like(tiny_bert()), tokens(3, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    with pytest.raises(ValueError, match="attention_mask: expected at least one real token in every row, got none in"):
        ours(ids, mask)


def test_without_labelled_positions():
    """The mean over zero positions is NaN, as in PyTorch."""
    ours, ids = ours_like(tiny_bert()), tokens(2, 7)
    for model in (ours, ours.train()):
        assert model(ids, labels=torch.full((2, 7), -100)).loss.isnan()


def test_initialisation_equals_hugging_faces():
    settings = {
        "num_hidden_layers": 2,
        "hidden_size": 96,
        "num_attention_heads": 2,
        "vocab_size": 800,
        "intermediate_size": 200,
        "initializer_range": 0.03,
    }
    for ours, theirs in (
        (BertForMaskedLM(BertConfig(**settings)), transformers.BertForMaskedLM(transformers.BertConfig(**settings))),
        (
            BertForSequenceClassification(BertConfig(**settings)),
            transformers.BertForSequenceClassification(transformers.BertConfig(**settings)),
        ),
    ):
        for (name, own), (other_name, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert name == other_name
            if other.std() == 0:
                assert torch.equal(own, other), name
            else:
                # 4.5 standard errors: σ/√(2n) for an estimated standard deviation, σ/√n for a mean
                assert abs(own.std() / other.std() - 1) < 4.5 / own.numel() ** 0.5, name
                assert abs(own.mean()) < 4.5 * other.std() / own.numel() ** 0.5, name
        assert not ours.bert.embeddings.word_embeddings.weight[0].any()  # the padding token


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype):
    theirs, (inputs, labels, where) = tiny_bert(), padded()
    ours = ours_like(theirs)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        mine, other = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    truth = theirs.double()(**inputs).logits
    assert mine.logits.dtype == other.logits.dtype
    assert (mine.logits - truth)[where].norm() <= 2 * (other.logits - truth)[where].norm()
    mine.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(tokens(2, 5) + 131), r"input_ids: expected values in \[0, 131\), got \d+"),
        (lambda m: m(tokens(2, 49)), r"input_ids: expected at most 48 tokens, the context of the model, got 49"),
        (
            lambda m: m(tokens(2, 5), torch.ones(5)),
            r"attention_mask: expected shape \(2, 5\): one value per token.*, got \(5,\)",
        ),
        (
            lambda m: m(tokens(2, 5), token_type_ids=torch.full((2, 5), 2)),
            r"token_type_ids: expected values in \[0, 2\), got 2",
        ),
        (
            lambda m: m(tokens(2, 5), position_ids=torch.full((1, 5), -1)),
            r"position_ids: expected values in \[0, 48\), got -1",
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
    ours = ours_like(tiny_bert())
    for model in (ours, ours.train()):
        with pytest.raises(ValueError, match=message):
            call(model)


def test_classifier_errors():
    ids = tokens(2, 5)
    ours = ours_like(tiny_bert("BertForSequenceClassification", num_labels=3))
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 3\) or -100, got 3"):
        ours(ids, labels=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"labels: expected shape \(2,\), as input_ids or inputs_embeds, got \(3,\)"):
        ours(ids, labels=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"labels: expected shape \(2, 3\), got \(2, 2\)"):
        ours(ids, labels=torch.rand(2, 2))
    with pytest.raises(ValueError, match=r"labels: expected shape \(2,\), got \(3,\)"):
        ours_like(tiny_bert("BertForSequenceClassification", num_labels=1))(ids, labels=torch.rand(3))
