"""The fused loss of heads: its numbers, what it leaves to the head, and transformers' Trainer around it."""

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

import fastlm
from fastlm.integrations.families import HEADS
from tests.integrations.accelerated import SETTINGS, accelerated, assert_close_gradients, ids, padded, tiny

LABELLED = [name for name in HEADS if name in vars(transformers) or hasattr(transformers, name)]


def head(name, **changes):
    family = next(family for family in sorted(SETTINGS, key=len, reverse=True) if name.startswith(family))
    if HEADS[name] and family != "GPT2":
        changes["is_decoder"] = True
    return tiny(family, name.removeprefix(family), **changes).train()


def labels_of(x, mask):
    return x.masked_fill((mask == 0) | (torch.rand(x.shape) < 0.5), -100)


@pytest.mark.parametrize("name", LABELLED)
def test_every_head(name):
    theirs = head(name)
    ours = accelerated(theirs)
    x, mask = padded(17, 5)
    inputs = {"input_ids": x, "attention_mask": mask, "labels": labels_of(x, mask)}
    own, other = ours(**inputs), theirs(**inputs)
    assert own.logits is None and type(own) is type(other) and list(own) == [key for key in other if key != "logits"]
    torch.testing.assert_close(own.loss, other.loss)
    own.loss.backward(), other.loss.backward()
    assert_close_gradients(ours, theirs)
    assert isinstance(ours(**inputs, return_dict=False), tuple)
    torch.testing.assert_close(ours(**inputs, return_dict=False)[0], other.loss)
    for model in (ours.eval(), theirs.eval()):
        model(**inputs)
    torch.testing.assert_close(ours(**inputs).logits[mask.bool()], theirs(**inputs).logits[mask.bool()], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss)
    assert "fused" not in str(fastlm.report(ours)) and any(entry.operator == "linear_cross_entropy" for entry in fastlm.report(ours).replaced)


@pytest.mark.parametrize("name", LABELLED)
def test_num_items_in_batch_and_other_settings_of_the_loss(name):
    theirs = head(name)
    ours, x = accelerated(theirs), ids(3, 9)
    for settings in ({"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(5)}, {"ignore_index": 9}, {"shift_labels": ids(3, 9)}):
        if "ignore_index" in settings and not HEADS[name]:
            continue
        own, other = (model(x, labels=x, **settings) for model in (ours, theirs))
        torch.testing.assert_close(own.loss, other.loss)
        assert own.logits is None


def test_positional_arguments_and_labels_of_another_integer_type():
    theirs = head("DistilBertForMaskedLM")
    ours, x = accelerated(theirs), ids(2, 7)
    torch.testing.assert_close(ours(x, None, None, x).loss, theirs(x, None, None, x).loss)
    torch.testing.assert_close(ours(x.int(), labels=x.int()).loss, theirs(x, labels=x).loss)


@pytest.mark.parametrize("case", ["no labels", "evaluation", "kept logits", "own loss", "projection with a hook", "another head", "off"])
def test_what_keeps_its_logits(case):
    theirs = tiny("GPT2", "LMHeadModel") if case != "another head" else tiny("Bert", "ForTokenClassification")
    ours, x = accelerated(theirs, loss=case != "off").train(), ids(2, 7)
    inputs = {"labels": x if case != "another head" else x % 2}
    if case == "no labels":
        inputs = {}
    elif case == "evaluation":
        ours.eval()
    elif case == "kept logits":
        inputs = {"logits_to_keep": 3}
    elif case == "own loss":
        ours.loss_function = lambda logits, labels, **kwargs: 2 * ForCausalLMLoss(logits, labels, **kwargs)
        assert "has a loss function of its own" in str(fastlm.report(ours))
    elif case == "projection with a hook":
        ours.lm_head.register_forward_hook(lambda module, args, out: out + 1)
        assert "its output projection has a forward hook" in str(fastlm.report(ours))
    output = ours(x, **inputs)
    assert output.logits is not None
    if case == "own loss":
        torch.testing.assert_close(output.loss, 2 * theirs(x, **inputs).loss)


def test_ties_and_resizing():
    """The vocabulary grows: a new module with new weights, still the embedding's."""
    theirs = tiny("GPT2", "LMHeadModel").train()
    ours = accelerated(theirs)
    for model in (ours, theirs):
        torch.manual_seed(0)
        model.resize_token_embeddings(140, mean_resizing=False)
        assert model.lm_head.weight is model.transformer.wte.weight
    ours.load_state_dict(theirs.state_dict())
    x = torch.randint(5, 140, (2, 7))
    own, other = ours(x, labels=x), theirs(x, labels=x)
    assert own.logits is None
    own.loss.backward(), other.loss.backward()
    assert_close_gradients(ours, theirs)
    ours.eval()
    assert ours(x).logits.shape[-1] == 140
    fastlm.restore(ours)
    assert not any("forward" in vars(module) for module in ours.modules())


def test_an_error_on_the_way_leaves_the_projection_as_it_was():
    ours, x = accelerated(tiny("GPT2", "LMHeadModel")).train(), ids(2, 7)
    ours.transformer.register_forward_hook(lambda *args: (_ for _ in ()).throw(KeyError("here")))
    with pytest.raises(KeyError, match="here"):
        ours(x, labels=x)
    ours.transformer._forward_hooks.clear()
    assert ours(x).logits.shape == (2, 7, 131)
    with pytest.raises(ValueError, match="target"):
        ours(x, labels=x + 1000)


# Trainer


def trained(tmp_path, model, **settings):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it: pip install 'fastlm[test]'")
    x = ids(12, 9)
    settings, arguments = {k: v for k, v in settings.items() if k == "compute_loss_func"}, {k: v for k, v in settings.items() if k != "compute_loss_func"}
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 1e-2, "seed": 0, **arguments}
    arguments = transformers.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, logging_steps=1, disable_tqdm=True, save_strategy="no", eval_strategy="steps", eval_steps=3, **arguments
    )
    data = [{"input_ids": row, "labels": row.masked_fill(torch.arange(9) > 3 + i % 5, -100)} for i, row in enumerate(x)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4], **settings)
    trainer.train()
    history = [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]
    return history, trainer.predict(data[:4]).predictions


def weighted(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}, {"compute_loss_func": weighted}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_trainer(name, settings, tmp_path, monkeypatch):
    """Losses of every step, of the evaluation, and predictions, are those of the model left alone."""
    theirs = head(name)
    ours = accelerated(theirs)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        results.append(trained(tmp_path, model, **settings))
    torch.testing.assert_close(torch.tensor(results[0][0]), torch.tensor(results[1][0]), rtol=2e-3, atol=1e-3)
    assert len(results[0][0]) == 4
    own, other = (torch.as_tensor(result[1][0] if isinstance(result[1], tuple) else result[1]) for result in results)
    torch.testing.assert_close(own, other, rtol=2e-2, atol=2e-2)
