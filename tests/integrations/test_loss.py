"""The fused loss of language-model heads, the cases that compute logits, and transformers' Trainer."""

import copy
import importlib
import inspect

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

import fastlm
from fastlm.integrations import loss as fused
from fastlm.integrations.families import FAMILIES
from tests.integrations.support import (
    ENCODERS,
    SETTINGS,
    accelerated_copy,
    assert_close_gradients,
    config_class,
    ids,
    model_class,
    padded,
    tiny,
)

HEADS = {name: head for family in FAMILIES.values() for name, head in family.heads.items()}
HOMES = {family: model_class(family).__module__ for family in SETTINGS}
LABELLED = [name for name in HEADS if name in vars(transformers) or hasattr(transformers, name)]


def head(name, **changes):
    family = next(family for family, home in HOMES.items() if name in FAMILIES[home].heads)
    if HEADS[name].shifted and family in ENCODERS:
        changes["is_decoder"] = True
    if name == "GPT2DoubleHeadsModel":
        changes["summary_first_dropout"] = 0.0
    return tiny(family, name.removeprefix(family).removeprefix("Gemma3"), **changes).train()


def labels_of(x, mask):
    return x.masked_fill((mask == 0) | (torch.rand(x.shape) < 0.5), -100)


def batch_of(name):
    """The arguments for the loss of a head, with padding."""
    if name == "GPT2DoubleHeadsModel":  # rows, choices, tokens
        x, mask = (t.view(2, 3, 17) for t in padded(17, 5, 9, 11, 3, 17))
        return {
            "input_ids": x,
            "attention_mask": mask,
            "labels": labels_of(x, mask),
            "mc_token_ids": mask.sum(-1) - 1,
            "mc_labels": torch.tensor([2, 0]),
        }
    x, mask = padded(17, 5)
    return {"input_ids": x, "attention_mask": mask, "labels": labels_of(x, mask)} | dict.fromkeys(
        second_labels(name), torch.tensor([1, 0])
    )


def second_labels(name):
    return (HEADS[name].second_loss or ())[:1]


def total_loss(output):
    return output.loss + (output.mc_loss if "mc_loss" in output else 0)


def test_the_table_has_every_head_with_an_output_projection():
    found = set()
    for family, home in HOMES.items():
        for name, kind in vars(importlib.import_module(home)).items():
            if (
                isinstance(kind, type)
                and kind.__module__ == home
                and issubclass(kind, transformers.PreTrainedModel)
                and kind.config_class is config_class(family)  # not a model of text and images
                and not name.endswith("PreTrainedModel")
            ):
                settings = {"summary_type": "cls_index"} if family == "GPT2" else {}
                if family in ENCODERS:
                    settings["is_decoder"] = "LMHead" in name or "Causal" in name
                model = kind(config_class(family)(**SETTINGS[family], **settings))
                if model.get_output_embeddings() is not None:
                    found.add(name)
    assert found == set(HEADS)


@pytest.mark.parametrize("name", LABELLED)
def test_every_head(name):
    reference, logits = head(name), HEADS[name].logits
    accelerated, inputs = accelerated_copy(reference), batch_of(name)
    mask = inputs["attention_mask"].bool()
    actual, expected = accelerated(**inputs), reference(**inputs)
    assert actual[logits] is None if logits in actual else getattr(actual, logits) is None
    assert type(actual) is type(expected) and list(actual) == [key for key in expected if key != logits]
    torch.testing.assert_close(actual.loss, expected.loss)
    total_loss(actual).backward(), total_loss(expected).backward()
    assert_close_gradients(accelerated, reference)
    assert isinstance(accelerated(**inputs, return_dict=False), tuple)
    torch.testing.assert_close(accelerated(**inputs, return_dict=False)[0], expected.loss)
    for model in (accelerated.eval(), reference.eval()):
        model(**inputs)
    torch.testing.assert_close(
        accelerated(**inputs)[logits][mask], reference(**inputs)[logits][mask], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(accelerated(**inputs).loss, reference(**inputs).loss)
    assert "fused" not in str(fastlm.report(accelerated)) and any(
        entry.operator == "linear_cross_entropy" for entry in fastlm.report(accelerated).replaced
    )


@pytest.mark.parametrize("name", LABELLED)
def test_num_items_in_batch_and_other_settings_of_the_loss(name):
    reference = head(name)
    accelerated, x = accelerated_copy(reference), ids(3, 9)
    others = dict.fromkeys(second_labels(name), torch.tensor([1, 0, 1]))
    for settings in (
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(5)},
        {"ignore_index": 9},
        {"shift_labels": ids(3, 9)},
    ):
        # The base model of other heads does not take these settings.
        if not HEADS[name].uses_loss_function and ("ignore_index" in settings or name == "GPT2DoubleHeadsModel"):
            continue
        # Heads for masked language modelling in transformers 4 do not take them.
        if "kwargs" not in inspect.signature(reference.forward).parameters:
            continue
        actual, expected = (model(x, labels=x, **others, **settings) for model in (accelerated, reference))
        torch.testing.assert_close(actual.loss, expected.loss)
        assert getattr(actual, HEADS[name].logits) is None


def test_positional_arguments_and_int32_labels():
    reference = head("DistilBertForMaskedLM")
    accelerated, x = accelerated_copy(reference), ids(2, 7)
    names = list(inspect.signature(reference.forward).parameters)
    before = [None] * (names.index("labels") - 1)
    torch.testing.assert_close(accelerated(x, *before, x).loss, reference(x, *before, x).loss)
    torch.testing.assert_close(accelerated(x.int(), labels=x.int()).loss, reference(x, labels=x).loss)


WITH_LOGITS = [
    "no labels",
    "evaluation",
    "kept logits",
    "custom loss",
    "custom loss module",
    "projection with a hook",
    "one label of two",
    "another head",
    "off",
]


@pytest.mark.parametrize("case", WITH_LOGITS)
def test_cases_that_compute_logits(case):
    named = {"another head": ("Bert", "ForTokenClassification"), "one label of two": ("Bert", "ForPreTraining")}
    reference = tiny(
        *named.get(case, ("DistilBert", "ForMaskedLM") if case == "custom loss module" else ("GPT2", "LMHeadModel"))
    )
    accelerated, x = accelerated_copy(reference, loss=case != "off").train(), ids(2, 7)
    inputs = {"labels": x if case != "another head" else x % 2}
    if case == "no labels":
        inputs = {}
    elif case == "evaluation":
        accelerated.eval()
    elif case == "kept logits":
        inputs = {"logits_to_keep": 3}
    elif case == "custom loss":
        accelerated.loss_function = lambda logits, labels, **kwargs: 2 * ForCausalLMLoss(logits, labels, **kwargs)
        assert "has a loss function of its own" in str(fastlm.report(accelerated))
    elif case == "custom loss module":
        accelerated.mlm_loss_fct = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        assert "has a loss function of its own" in str(fastlm.report(accelerated))
    elif case == "projection with a hook":
        accelerated.lm_head.register_forward_hook(lambda module, args, out: out + 1)
        assert "its output projection has a forward hook" in str(fastlm.report(accelerated))
    output = accelerated(x, **inputs)
    assert output["prediction_logits" if case == "one label of two" else "logits"] is not None
    if case == "one label of two":
        assert output.loss is None
    if case == "custom loss module":
        smoothed = F.cross_entropy(reference(x).logits.flatten(0, 1), x.flatten(), label_smoothing=0.1)
        torch.testing.assert_close(output.loss, smoothed)
    if case == "custom loss":
        torch.testing.assert_close(output.loss, 2 * reference(x, **inputs).loss)


@pytest.mark.parametrize("name", LABELLED)
def test_a_tied_table_has_one_gradient(name):
    """Autograd accumulates one gradient of the table, not one per use, and its bits are the same in every step."""
    reference = head(
        name, tie_word_embeddings=True, **({} if name.startswith(("GPT2", "Distil")) else {"pad_token_id": 7})
    )
    accelerated, inputs = accelerated_copy(reference), batch_of(name)
    table = accelerated.get_input_embeddings().weight
    assert table is accelerated.get_output_embeddings().weight
    visited = []
    table.register_hook(lambda gradient: visited.append(gradient.clone()))
    table.register_post_accumulate_grad_hook(lambda p: visited.append(p.grad.clone()))
    loss = total_loss(accelerated(**inputs))
    assert (
        count_gradient_edges(table, loss.grad_fn) == 1
        and count_gradient_edges(reference.get_input_embeddings().weight, total_loss(reference(**inputs)).grad_fn) == 2
    )
    loss.backward()
    total_loss(reference(**inputs)).backward()
    assert_close_gradients(accelerated, reference)
    assert len(visited) == 2 and torch.equal(visited[0], table.grad) and torch.equal(visited[1], table.grad)
    first = table.grad.clone()
    total_loss(accelerated(**inputs)).backward()
    assert torch.equal(table.grad, 2 * first)
    loss = total_loss(accelerated(**inputs))
    table.grad = None
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(table.grad, 2 * first)


def count_gradient_edges(parameter, node):
    """How many gradients of a parameter the backward pass accumulates."""
    visited, pending, found = {node}, [node], 0
    while pending:
        for node_before, _ in pending.pop().next_functions:
            found += getattr(node_before, "variable", None) is parameter
            if node_before is not None and node_before not in visited:
                visited.add(node_before)
                pending.append(node_before)
    return found


@pytest.mark.parametrize(
    "case",
    [
        "untied",
        "frozen",
        "another class",
        "another forward",
        "inputs_embeds given",
        "checkpointed",
        "two lookups",
        "hook",
        "no labels",
    ],
)
def test_tables_that_are_not_shared(case):
    """Whether the embedding and the loss share the table is decided at every call."""
    reference = tiny("GPT2", "LMHeadModel", tie_word_embeddings=case != "untied").train()
    accelerated, (x, mask) = accelerated_copy(reference), padded(9, 5, tokens=9)
    inputs = {"input_ids": x, "attention_mask": mask, "labels": x.masked_fill(mask == 0, -100)}
    accelerated(**inputs).loss.backward()
    accelerated.zero_grad()
    for model in (accelerated, reference):
        embedding = model.transformer.wte
        if case == "frozen":
            embedding.weight.requires_grad_(False)
        elif case == "another class":
            embedding.__class__ = type(
                "Scaled", (torch.nn.Embedding,), {"forward": lambda self, x: torch.nn.Embedding.forward(self, x) * 2}
            )
        elif case == "another forward":
            embedding.forward = lambda x, embedding=embedding: type(embedding).forward(embedding, x) * 2
        elif case == "inputs_embeds given":
            inputs["inputs_embeds"] = (
                embedding(x).detach() if "inputs_embeds" not in inputs else inputs["inputs_embeds"]
            )
        elif case == "checkpointed":  # the first of its two runs records no graph
            original = model.transformer.forward
            model.transformer.forward = lambda x, original=original, **rest: reentrant(original, x, rest)
        elif case == "two lookups":
            inputs["token_type_ids"] = x // 2
        elif case == "hook":
            embedding.register_forward_hook(lambda module, args, out: out * 2)
    if case == "inputs_embeds given":
        del inputs["input_ids"]
    if case == "no labels":
        del inputs["labels"]
        for model in (accelerated, reference):
            model(**inputs).logits[mask.bool()].square().mean().backward()
    else:
        actual, expected = accelerated(**inputs).loss, reference(**inputs).loss
        torch.testing.assert_close(actual, expected)
        actual.backward(), expected.backward()
    assert_close_gradients(accelerated, reference)
    assert not any(
        vars(module)["forward"].shares_table
        for module in accelerated.modules()
        if isinstance(vars(module).get("forward"), fused.EmbeddingPatch)
    )


def reentrant(forward, x, rest):
    """A model under PyTorch's reentrant checkpoint, which needs an input with a gradient."""

    def run(anchor):
        return forward(x, **rest).last_hidden_state + 0 * anchor

    hidden = torch.utils.checkpoint.checkpoint(run, torch.zeros((), requires_grad=True), use_reentrant=True)
    return transformers.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)


def test_error_of_a_tied_table_under_autocast():
    reference = head("GPT2LMHeadModel")
    accelerated, inputs = accelerated_copy(reference), batch_of("GPT2LMHeadModel")
    exact_model = copy.deepcopy(reference).double()
    for model in (accelerated, reference):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
    exact_model(**inputs).loss.backward()
    exact = exact_model.lm_head.weight.grad
    error, allowed = ((model.lm_head.weight.grad - exact).square().mean().sqrt() for model in (accelerated, reference))
    assert 0 < error <= 2 * allowed


def test_resizing_tied_embeddings():
    """Resizing makes a new output projection, whose weight is the new table."""
    reference = tiny("GPT2", "LMHeadModel").train()
    accelerated = accelerated_copy(reference)
    for model in (accelerated, reference):
        torch.manual_seed(0)
        model.resize_token_embeddings(140, mean_resizing=False)
        assert model.lm_head.weight is model.transformer.wte.weight
    accelerated.load_state_dict(reference.state_dict())
    x = torch.randint(5, 140, (2, 7))
    actual, expected = accelerated(x, labels=x), reference(x, labels=x)
    assert actual.logits is None
    actual.loss.backward(), expected.loss.backward()
    assert_close_gradients(accelerated, reference)
    accelerated.eval()
    assert accelerated(x).logits.shape[-1] == 140
    fastlm.restore(accelerated)
    assert not any("forward" in vars(module) for module in accelerated.modules())


def test_the_projection_is_reset_after_an_error():
    accelerated, x = accelerated_copy(tiny("GPT2", "LMHeadModel")).train(), ids(2, 7)
    accelerated.transformer.register_forward_hook(lambda *args: (_ for _ in ()).throw(KeyError("here")))
    with pytest.raises(KeyError, match="here"):
        accelerated(x, labels=x)
    accelerated.transformer._forward_hooks.clear()
    assert accelerated(x).logits.shape == (2, 7, 131)
    with pytest.raises(ValueError, match="target"):
        accelerated(x, labels=x + 1000)


# Trainer


def trained(tmp_path, model, **settings):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it: pip install 'fastlm[test]'")
    x = ids(12, 9)
    settings, arguments = (
        {k: v for k, v in settings.items() if k == "compute_loss_func"},
        {k: v for k, v in settings.items() if k != "compute_loss_func"},
    )
    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "seed": 0,
        **arguments,
    }
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=3,
        **arguments,
    )
    data = [{"input_ids": row, "labels": row.masked_fill(torch.arange(9) > 3 + i % 5, -100)} for i, row in enumerate(x)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4], **settings)
    trainer.train()
    history = [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]
    return history, trainer.predict(data[:4]).predictions


def smoothed_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"label_smoothing_factor": 0.1}, {"compute_loss_func": smoothed_loss}, {"gradient_checkpointing": True}],
    ids=lambda s: "-".join(s) or "plain",
)
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_trainer(name, settings, tmp_path, monkeypatch):
    """Training losses, evaluation losses and predictions match those of the original model."""
    reference = head(name)
    accelerated = accelerated_copy(reference)
    results = []
    for model in (accelerated, reference):
        torch.manual_seed(3)
        results.append(trained(tmp_path, model, **settings))
    torch.testing.assert_close(torch.tensor(results[0][0]), torch.tensor(results[1][0]), rtol=2e-3, atol=1e-3)
    assert len(results[0][0]) == 4
    actual, expected = (
        torch.as_tensor(result[1][0] if isinstance(result[1], tuple) else result[1]) for result in results
    )
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
