"""The fused loss of heads: its numbers, what it leaves to the head, and transformers' Trainer around it."""

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
from tests.integrations.accelerated import SETTINGS, accelerated, assert_close_gradients, ids, padded, tiny

HEADS = {name: head for family in FAMILIES.values() for name, head in family.heads.items()}
HOMES = [
    next(home for home in FAMILIES if home.endswith(f".modeling_{snake}"))
    for snake in ("gpt2", "bert", "roberta", "xlm_roberta", "camembert", "electra", "distilbert")
]
LABELLED = [name for name in HEADS if name in vars(transformers) or hasattr(transformers, name)]


def head(name, **changes):
    family = next(family for family in sorted(SETTINGS, key=len, reverse=True) if name.startswith(family))
    if HEADS[name].uses_loss_function and family != "GPT2":
        changes["is_decoder"] = True
    if name == "GPT2DoubleHeadsModel":
        changes["summary_first_dropout"] = 0.0
    return tiny(family, name.removeprefix(family), **changes).train()


def labels_of(x, mask):
    return x.masked_fill((mask == 0) | (torch.rand(x.shape) < 0.5), -100)


def batch_of(name):
    """What a head needs to compute its loss, some of it padding."""
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
        other_labels(name), torch.tensor([1, 0])
    )


def other_labels(name):
    return (HEADS[name].second_loss or ())[:1]


def whole_loss(output):
    return output.loss + (output.mc_loss if "mc_loss" in output else 0)


def test_the_table_has_every_head_over_the_vocabulary():
    """Of transformers' classes of these families: those that have an output projection."""
    found = set()
    for family, home in zip(SETTINGS, HOMES, strict=True):
        for name, kind in vars(importlib.import_module(home)).items():
            if (
                isinstance(kind, type)
                and kind.__module__ == home
                and issubclass(kind, transformers.PreTrainedModel)
                and not name.endswith("PreTrainedModel")
            ):
                settings = (
                    {"summary_type": "cls_index"}
                    if family == "GPT2"
                    else {"is_decoder": "LMHead" in name or "Causal" in name}
                )
                if (
                    kind(
                        getattr(transformers, f"{family}Config")(**SETTINGS[family], **settings)
                    ).get_output_embeddings()
                    is not None
                ):
                    found.add(name)
    assert found == set(HEADS)


@pytest.mark.parametrize("name", LABELLED)
def test_every_head(name):
    theirs, logits = head(name), HEADS[name].logits
    ours, inputs = accelerated(theirs), batch_of(name)
    mask = inputs["attention_mask"].bool()
    own, other = ours(**inputs), theirs(**inputs)
    assert own[logits] is None if logits in own else getattr(own, logits) is None
    assert type(own) is type(other) and list(own) == [key for key in other if key != logits]
    torch.testing.assert_close(own.loss, other.loss)
    whole_loss(own).backward(), whole_loss(other).backward()
    assert_close_gradients(ours, theirs)
    assert isinstance(ours(**inputs, return_dict=False), tuple)
    torch.testing.assert_close(ours(**inputs, return_dict=False)[0], other.loss)
    for model in (ours.eval(), theirs.eval()):
        model(**inputs)
    torch.testing.assert_close(ours(**inputs)[logits][mask], theirs(**inputs)[logits][mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss)
    assert "fused" not in str(fastlm.report(ours)) and any(
        entry.operator == "linear_cross_entropy" for entry in fastlm.report(ours).replaced
    )


@pytest.mark.parametrize("name", LABELLED)
def test_num_items_in_batch_and_other_settings_of_the_loss(name):
    theirs = head(name)
    ours, x = accelerated(theirs), ids(3, 9)
    others = dict.fromkeys(other_labels(name), torch.tensor([1, 0, 1]))
    for settings in (
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(5)},
        {"ignore_index": 9},
        {"shift_labels": ids(3, 9)},
    ):
        if not HEADS[name].uses_loss_function and (
            "ignore_index" in settings or name == "GPT2DoubleHeadsModel"
        ):  # its base model takes none of them
            continue
        if "kwargs" not in inspect.signature(theirs.forward).parameters:  # masked heads of transformers 4
            continue
        own, other = (model(x, labels=x, **others, **settings) for model in (ours, theirs))
        torch.testing.assert_close(own.loss, other.loss)
        assert getattr(own, HEADS[name].logits) is None


def test_positional_arguments_and_labels_of_another_integer_type():
    theirs = head("DistilBertForMaskedLM")
    ours, x = accelerated(theirs), ids(2, 7)
    names = list(inspect.signature(theirs.forward).parameters)
    before = [None] * (names.index("labels") - 1)
    torch.testing.assert_close(ours(x, *before, x).loss, theirs(x, *before, x).loss)
    torch.testing.assert_close(ours(x.int(), labels=x.int()).loss, theirs(x, labels=x).loss)


KEPT = [
    "no labels",
    "evaluation",
    "kept logits",
    "own loss",
    "own loss of a module",
    "projection with a hook",
    "one label of two",
    "another head",
    "off",
]


@pytest.mark.parametrize("case", KEPT)
def test_what_keeps_its_logits(case):
    named = {"another head": ("Bert", "ForTokenClassification"), "one label of two": ("Bert", "ForPreTraining")}
    theirs = tiny(
        *named.get(case, ("DistilBert", "ForMaskedLM") if case == "own loss of a module" else ("GPT2", "LMHeadModel"))
    )
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
    elif case == "own loss of a module":
        ours.mlm_loss_fct = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        assert "has a loss function of its own" in str(fastlm.report(ours))
    elif case == "projection with a hook":
        ours.lm_head.register_forward_hook(lambda module, args, out: out + 1)
        assert "its output projection has a forward hook" in str(fastlm.report(ours))
    output = ours(x, **inputs)
    assert output["prediction_logits" if case == "one label of two" else "logits"] is not None
    if case == "one label of two":
        assert output.loss is None
    if case == "own loss of a module":
        smoothed = F.cross_entropy(theirs(x).logits.flatten(0, 1), x.flatten(), label_smoothing=0.1)
        torch.testing.assert_close(output.loss, smoothed)
    if case == "own loss":
        torch.testing.assert_close(output.loss, 2 * theirs(x, **inputs).loss)


@pytest.mark.parametrize("name", LABELLED)
def test_a_tied_table_has_one_gradient(name):
    """Not a second one of the embedding's that is added to the projection's; and the same bits of it in every step, accumulated or not."""
    theirs = head(
        name, tie_word_embeddings=True, **({} if name.startswith(("GPT2", "Distil")) else {"pad_token_id": 7})
    )
    ours, inputs = accelerated(theirs), batch_of(name)
    table = ours.get_input_embeddings().weight
    assert table is ours.get_output_embeddings().weight
    seen = []
    table.register_hook(lambda gradient: seen.append(gradient.clone()))
    table.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    loss = whole_loss(ours(**inputs))
    assert (
        ways_to(table, loss.grad_fn) == 1
        and ways_to(theirs.get_input_embeddings().weight, whole_loss(theirs(**inputs)).grad_fn) == 2
    )
    loss.backward()
    whole_loss(theirs(**inputs)).backward()
    assert_close_gradients(ours, theirs)
    assert len(seen) == 2 and torch.equal(seen[0], table.grad) and torch.equal(seen[1], table.grad)
    once = table.grad.clone()
    whole_loss(ours(**inputs)).backward()
    assert torch.equal(table.grad, 2 * once)
    loss = whole_loss(ours(**inputs))
    table.grad = None
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(table.grad, 2 * once)


def ways_to(parameter, node):
    """How many gradients of a parameter backward would add up."""
    seen, waiting, found = {node}, [node], 0
    while waiting:
        for following, _ in waiting.pop().next_functions:
            found += getattr(following, "variable", None) is parameter
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


@pytest.mark.parametrize(
    "case",
    [
        "untied",
        "frozen",
        "its own kind",
        "its own forward",
        "given embeddings",
        "checkpointed",
        "twice",
        "hook",
        "no labels",
    ],
)
def test_a_table_where_two_gradients_do_not_meet(case):
    """As without: whether the table is handed on is asked at every call."""
    theirs = tiny("GPT2", "LMHeadModel", tie_word_embeddings=case != "untied").train()
    ours, (x, mask) = accelerated(theirs), padded(9, 5, tokens=9)
    inputs = {"input_ids": x, "attention_mask": mask, "labels": x.masked_fill(mask == 0, -100)}
    ours(**inputs).loss.backward()
    ours.zero_grad()
    for model in (ours, theirs):
        embedding = model.transformer.wte
        if case == "frozen":
            embedding.weight.requires_grad_(False)
        elif case == "its own kind":
            embedding.__class__ = type(
                "Scaled", (torch.nn.Embedding,), {"forward": lambda self, x: torch.nn.Embedding.forward(self, x) * 2}
            )
        elif case == "its own forward":
            embedding.forward = lambda x, embedding=embedding: type(embedding).forward(embedding, x) * 2
        elif case == "given embeddings":
            inputs["inputs_embeds"] = (
                embedding(x).detach() if "inputs_embeds" not in inputs else inputs["inputs_embeds"]
            )
        elif case == "checkpointed":  # the first of its two runs has no graph
            whole = model.transformer.forward
            model.transformer.forward = lambda x, whole=whole, **rest: reentrant(whole, x, rest)
        elif case == "twice":
            inputs["token_type_ids"] = x // 2
        elif case == "hook":
            embedding.register_forward_hook(lambda module, args, out: out * 2)
    if case == "given embeddings":
        del inputs["input_ids"]
    if case == "no labels":
        del inputs["labels"]
        for model in (ours, theirs):
            model(**inputs).logits[mask.bool()].square().mean().backward()
    else:
        own, other = ours(**inputs).loss, theirs(**inputs).loss
        torch.testing.assert_close(own, other)
        own.backward(), other.backward()
    assert_close_gradients(ours, theirs)
    assert not any(
        vars(module)["forward"].shares_table
        for module in ours.modules()
        if isinstance(vars(module).get("forward"), fused.EmbeddingPatch)
    )


def reentrant(forward, x, rest):
    """A whole model under PyTorch's older checkpoint, which wants an input with a gradient."""

    def run(anchor):
        return forward(x, **rest).last_hidden_state + 0 * anchor

    hidden = torch.utils.checkpoint.checkpoint(run, torch.zeros((), requires_grad=True), use_reentrant=True)
    return transformers.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)


def test_what_a_tied_table_costs_under_autocast():
    theirs = head("GPT2LMHeadModel")
    ours, inputs = accelerated(theirs), batch_of("GPT2LMHeadModel")
    truth = copy.deepcopy(theirs).double()
    for model in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
    truth(**inputs).loss.backward()
    true = truth.lm_head.weight.grad
    own, allowed = ((model.lm_head.weight.grad - true).square().mean().sqrt() for model in (ours, theirs))
    assert 0 < own <= 2 * allowed


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


def weighted(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"label_smoothing_factor": 0.1}, {"compute_loss_func": weighted}, {"gradient_checkpointing": True}],
    ids=lambda s: "-".join(s) or "plain",
)
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
