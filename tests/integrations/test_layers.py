"""Layers of every family against transformers' own: numbers, dropout, hooks, adapters, checkpointing, compilation."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.integrations import layers
from tests.integrations.accelerated import (
    ENCODERS,
    SETTINGS,
    accelerated,
    assert_close_gradients,
    assert_within_twice,
    classes_of,
    gradients,
    ids,
    padded,
    tiny,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
DTYPES = [torch.float32, torch.bfloat16]
VARIANTS = {
    "exact GELU": {"activation_function": "gelu"},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "not scaled": {"scale_attn_weights": False},
    "narrow inside": {"n_inner": 50, "n_head": 1, "layer_norm_epsilon": 1e-3},
}


def right_padded():
    x, mask = padded(17, 5, 9)
    return {"input_ids": x, "attention_mask": mask}, x.masked_fill(mask == 0, -100), mask.bool()


def left_padded():
    inputs, labels, where = right_padded()
    return {name: x.flip(1) for name, x in inputs.items()}, labels.flip(1), where.flip(1)


def plain():
    x = ids(2, 17)
    return {"input_ids": x}, x.masked_fill(torch.rand(2, 17) < 0.5, -100), ...


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("draw", [plain, right_padded])
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family, draw, dtype):
    assert_within_twice(lambda: tiny(family, "ForMaskedLM"), draw, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("draw", [plain, right_padded, left_padded])
def test_gpt2(draw, dtype):
    assert_within_twice(lambda: tiny("GPT2", "LMHeadModel"), draw, dtype, shifted=True)


@pytest.mark.parametrize(("family", "head"), [(family, head) for family in SETTINGS for head in classes_of(family)])
def test_every_model_of_every_family(family, head):
    """What comes out and every gradient are those of the model left alone, with padding that the encoders leave out."""
    settings = {"is_decoder": True} if head in ("LMHeadModel", "ForCausalLM") and family != "GPT2" else {}
    theirs = tiny(family, head, **settings)
    ours = accelerated(theirs)
    assert not fastlm.report(ours).left_alone
    x, mask = padded(11, 5, 9, 3)
    if head in ("ForMultipleChoice", "DoubleHeadsModel"):
        x, mask = x.view(2, 2, -1), mask.view(2, 2, -1)
    for model in (ours, theirs):
        model.zero_grad()
        results = [result for result in model(x, attention_mask=mask).to_tuple() if isinstance(result, torch.Tensor)]
        seen = [result[mask.bool()] if result.shape[: mask.dim()] == mask.shape else result for result in results]
        sum(result.square().mean() for result in seen).backward()
        if model is ours:
            own = seen
    assert len(own) == len(seen) > 0
    for a, b in zip(own, seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert_close_gradients(ours, theirs)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_gpt2_as_configured(changes):
    assert_within_twice(lambda: tiny("GPT2", "LMHeadModel", **changes), plain, shifted=True)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
def test_decoders_of_bert_are_causal(family):
    theirs = tiny(family, "LMHeadModel" if family == "Bert" else "ForCausalLM", is_decoder=True)
    ours = accelerated(theirs)
    x, mask = padded(17, 5)
    torch.testing.assert_close(
        ours(x, attention_mask=mask).logits[mask.bool()], theirs(x, attention_mask=mask).logits[mask.bool()], **CLOSE
    )
    changed = x.clone()
    changed[:, 9:] = 7
    assert torch.equal(ours(x).logits[:, :9], ours(changed).logits[:, :9])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "head"), [("Bert", "LMHeadModel"), ("GPT2", "LMHeadModel")])
def test_cross_attention_is_left_to_its_class(family, head, implementation):
    theirs = tiny(family, head, is_decoder=True, add_cross_attention=True)
    theirs.set_attn_implementation(implementation)
    ours, x = accelerated(theirs), ids(2, 7)
    encoded, seen = torch.randn(2, 5, 36), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    arguments = {"encoder_hidden_states": encoded, "encoder_attention_mask": seen}
    torch.testing.assert_close(ours(x, **arguments).logits, theirs(x, **arguments).logits, **CLOSE)


# Dropout


@pytest.mark.parametrize("name", ["resid_pdrop", "attn_pdrop"])
def test_dropout_drops_what_it_would(name):
    """The mean over many draws, and their spread, are transformers' own."""
    assert_same_distribution(tiny("GPT2", **{name: 0.5}), {})


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_of_post_norm_layers(name):
    """Padded too: what was packed is drawn for as what was not."""
    assert_same_distribution(tiny("Bert", **{name: 0.5}), {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])})


def assert_same_distribution(theirs, inputs, draws=3000):
    ours = accelerated(theirs).train()
    for model in (theirs.train(), ours):  # of the embeddings alone: what is compared is inside the layers
        (model.drop if hasattr(model, "drop") else model.embeddings.dropout).eval()
    x = ids(1, 6).expand(draws, -1)
    inputs = {key: value.expand(draws, -1) for key, value in inputs.items()}
    with torch.no_grad():
        own, other = ours(x, **inputs).last_hidden_state, theirs(x, **inputs).last_hidden_state
    if inputs:
        own, other = own[:, :4], other[:, :4]
    spread = other.std(0)
    assert spread.min() > 0.01
    torch.testing.assert_close(own.std(0), spread, rtol=0.15, atol=0.0)
    assert ((own.mean(0) - other.mean(0)) / spread).abs().max() < 5 * (
        2 / draws
    ) ** 0.5  # five standard errors of the difference


def test_every_dropout_is_drawn_anew_and_repeats_with_its_seed():
    for family, names in (("GPT2", ("resid_pdrop", "attn_pdrop")), ("DistilBert", ("dropout", "attention_dropout"))):
        for name in names:
            model, x = accelerated(tiny(family, **{name: 0.3})), ids(2, 7)
            assert torch.equal(model(x)[0], model(x)[0])
            model.train()
            torch.manual_seed(3)
            first, second = model(x)[0], model(x)[0]
            torch.manual_seed(3)
            assert torch.equal(first, model(x)[0]) and not torch.equal(first, second)


def test_a_part_in_eval_mode_drops_nothing():
    model = accelerated(tiny("Bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or "SelfAttention" in type(module).__name__:
            module.eval()
    assert torch.equal(model(x := ids(2, 7))[0], model(x)[0])


# Hooks and adapters, which may come after


PLACES = {
    "GPT2": (
        "h.0",
        "h.0.ln_1",
        "h.0.attn",
        "h.0.attn.c_attn",
        "h.0.attn.c_proj",
        "h.0.attn.resid_dropout",
        "h.0.ln_2",
        "h.0.mlp",
        "h.0.mlp.c_fc",
        "h.0.mlp.act",
    ),
    "Bert": (
        "encoder.layer.0",
        "encoder.layer.0.attention",
        "encoder.layer.0.attention.self",
        "encoder.layer.0.attention.self.key",
        "encoder.layer.0.attention.output",
        "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.attention.output.LayerNorm",
        "encoder.layer.0.intermediate",
        "encoder.layer.0.intermediate.dense",
        "encoder.layer.0.output",
        "encoder.layer.0.output.dropout",
    ),
    "DistilBert": (
        "transformer.layer.0.attention",
        "transformer.layer.0.attention.out_lin",
        "transformer.layer.0.sa_layer_norm",
        "transformer.layer.0.ffn",
        "transformer.layer.0.ffn.lin2",
        "transformer.layer.0.output_layer_norm",
    ),
}
CASES = [(family, place) for family, places in PLACES.items() for place in places]


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.parametrize(("family", "place"), CASES, ids=[f"{family}-{place}" for family, place in CASES])
def test_a_hook_anywhere_sees_what_it_would_see(family, place, kind):
    theirs = tiny(family)
    ours = accelerated(theirs)
    x, mask = padded(7, 7, tokens=7) if family == "GPT2" else padded(7, 4, tokens=7)
    results = []
    for model in (theirs, ours):
        model(x, attention_mask=mask)  # a call before the hook is there
        module, seen = model.get_submodule(place), []
        handle = hook(module, kind, seen.append)
        model(x, attention_mask=mask)[0][mask.bool()].square().sum().backward()
        handle.remove()
        results.append(seen)
    assert len(results[0]) == len(results[1]) == 1
    a, b = results[1][0], results[0][0]
    assert a.shape == b.shape
    torch.testing.assert_close(
        a[mask.bool()] if a.shape[:2] == mask.shape else a,
        b[mask.bool()] if b.shape[:2] == mask.shape else b,
        rtol=1e-3,
        atol=1e-4,
    )
    assert not fastlm.report(ours).left_alone  # gone with the hook


def hook(module, kind, take):
    if kind == "forward":
        return module.register_forward_hook(lambda module, args, out: take(first(out).detach()))
    if kind == "pre":
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: take(first((*args, *kwargs.values())).detach()), with_kwargs=True
        )
    return module.register_full_backward_hook(lambda module, before, after: take(first(after).detach()))


def first(x):
    return next(item for item in x if item is not None) if isinstance(x, tuple) else x


def test_a_hook_that_changes_something_changes_it():
    for family, place in CASES:
        model = accelerated(tiny(family))
        x = ids(2, 7)
        before = model(x)[0]
        twice = lambda module, args, out: (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2  # noqa: E731
        module = model.get_submodule(place)
        handle = module.register_forward_hook(twice)
        assert not torch.allclose(before, model(x)[0], rtol=1e-3), (family, place)
        handle.remove()
        assert torch.equal(before, model(x)[0])
        module._forward_hooks[-1] = twice  # without PyTorch's help
        assert not torch.allclose(before, model(x)[0], rtol=1e-3), (family, place)
        module._forward_hooks.clear()


@pytest.mark.parametrize("how", ["forward", "class", "parametrization", "weight"])
def test_what_is_put_into_a_module_later_computes(how):
    """Between two calls, without a hook: a forward of its own, another class, a weight that is computed, one that is another kind of tensor."""

    class Doubled(torch.Tensor):
        """What sharding or quantisation puts in a weight's place: only PyTorch's own operators know what it means."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            def plain(x):
                return x.as_subclass(torch.Tensor) * 2 if type(x) is cls else x

            return function(*map(plain, args), **{name: plain(x) for name, x in (kwargs or {}).items()})

    for family, place in (
        ("Bert", "encoder.layer.0.output.dense"),
        ("DistilBert", "transformer.layer.1.sa_layer_norm"),
        ("GPT2", "h.0.attn.c_proj"),
    ):
        model = accelerated(tiny(family))
        x, module = ids(2, 7), model.get_submodule(place)
        before, kind, weight = model(x)[0], type(module), module.weight
        if how == "forward":
            module.forward = lambda x, module=module: type(module).forward(module, x) * 2
        elif how == "class":
            module.__class__ = type("Other", (kind,), {"forward": lambda self, x, kind=kind: kind.forward(self, x) * 2})
        elif how == "parametrization":
            nn.utils.parametrize.register_parametrization(module, "weight", nn.Softplus())
        else:
            module._parameters["weight"] = weight.detach().as_subclass(Doubled)
        assert not torch.allclose(model(x)[0], before, rtol=1e-2), (family, how)
        if how == "forward":
            del module.forward
        elif how == "class":
            module.__class__ = kind
        elif how == "parametrization":
            nn.utils.parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        else:
            module._parameters["weight"] = weight
        assert torch.equal(model(x)[0], before)


def test_a_global_hook_sees_every_module():
    theirs, seen = tiny("Bert"), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen[-1].append(type(module)))
    try:
        for model in (theirs, accelerated(theirs)):
            seen.append([])
            model(ids(1, 5))
    finally:
        handle.remove()
    assert seen[0] == seen[1]


class Adapter(nn.Module):
    """What adapters do to a projection: a low-rank product beside it. Written by hand; test_transformers.py uses PEFT's own."""

    def __init__(self, inner, width, out):
        super().__init__()
        self.inner, self.a, self.b = inner, nn.Linear(width, 2, bias=False), nn.Linear(2, out, bias=False)

    def forward(self, x):
        return self.inner(x) + self.b(self.a(x))


@pytest.mark.parametrize(
    ("family", "place", "width", "out", "operators"),
    [
        ("GPT2", "h.1.attn.c_attn", 36, 108, {"linear"}),
        ("GPT2", "h.1.mlp.c_proj", 144, 36, {"gelu_mlp"}),
        ("Bert", "encoder.layer.1.attention.self.value", 36, 36, {"linear"}),
        ("Bert", "encoder.layer.1.intermediate.dense", 36, 80, {"gelu_mlp"}),
        ("DistilBert", "transformer.layer.1.attention.out_lin", 36, 36, {"linear"}),
    ],
)
def test_an_adapter_put_in_later_computes_and_the_rest_stays_fused(family, place, width, out, operators):
    theirs = tiny(family)
    ours = accelerated(theirs)
    adapter = Adapter(None, width, out)
    for model in (theirs, ours):
        owner, _, name = place.rpartition(".")
        its = copy.deepcopy(adapter)
        its.inner = model.get_submodule(place)
        setattr(model.get_submodule(owner), name, its)
    x, mask = padded(7, 4, tokens=7)
    for model in (theirs, ours):
        model(x, attention_mask=mask)[0][mask.bool()].square().sum().backward()
    assert_close_gradients(ours, theirs)
    left = fastlm.report(ours).left_alone
    assert {entry.operator for entry in left} == operators and all("Adapter" in entry.reason for entry in left)


def test_other_activations_are_left_alone():
    for changes, reason in (
        ({"hidden_act": "relu"}, "intermediate.intermediate_act_fn is not a plain GELU"),
        ({"hidden_act": "gelu_10"}, "not a plain GELU"),
    ):
        theirs = tiny("Bert", **changes)
        ours, x = accelerated(theirs), ids(2, 7)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0], **CLOSE)
        assert all(reason in entry.reason and entry.operator == "gelu_mlp" for entry in fastlm.report(ours).left_alone)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantised_projections_are_left_alone():
    quantised = torch.ao.quantization.quantize_dynamic(tiny("Bert"), {nn.Linear})
    ours, x = accelerated(quantised), ids(2, 7)
    torch.testing.assert_close(ours(x)[0], quantised(x)[0], **CLOSE)
    report = fastlm.report(ours)
    assert {entry.operator for entry in report.left_alone} == {"linear", "gelu_mlp"}
    assert {entry.operator for entry in report.replaced} == {"attention", "layernorm_residual"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_pruned_projections_are_left_alone(when):
    theirs, places = tiny("Bert"), ("encoder.layer.0.attention.self.key", "encoder.layer.1.output.dense")
    ours = copy.deepcopy(theirs)
    if when == "after":
        fastlm.accelerate(ours)
    for model in (theirs, ours):
        for place in places:
            prune.random_unstructured(model.get_submodule(place), "weight", 0.5)
    ours.load_state_dict(theirs.state_dict())
    if when == "before":
        fastlm.accelerate(ours)
    x, mask = padded(7, 4, tokens=7)
    for model in (ours, theirs):
        model(x, attention_mask=mask)[0][mask.bool()].square().sum().backward()
    assert_close_gradients(ours, theirs)
    left = fastlm.report(ours).left_alone
    assert [entry.operator for entry in left] == [
        "attention",
        "linear",
        "gelu_mlp",
    ]  # pruning is a hook: padding stays for it
    assert left[1].module == places[0] and left[2].module.startswith("encoder.layer.1.")
    for place in places:
        prune.remove(ours.get_submodule(place), "weight")
    assert not fastlm.report(ours).left_alone


# Everything around a layer


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["GPT2", "Bert", "DistilBert"])
def test_checkpointing_gives_the_same_bits(family, reentrant):
    """With dropout, padding, and the loss."""
    dropouts = {
        "GPT2": {"resid_pdrop": 0.2, "attn_pdrop": 0.2},
        "Bert": {"hidden_dropout_prob": 0.2},
        "DistilBert": {"dropout": 0.2},
    }[family]
    model = accelerated(tiny(family, "LMHeadModel" if family == "GPT2" else "ForMaskedLM", **dropouts)).train()
    x, mask = padded(17, 5, 9)
    found = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        counted = count_calls(layers.fastlm, "gelu_mlp")
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100)).loss
        loss.backward()
        assert len(counted.stop()) == (4 if on else 2)  # each of two layers, and again in backward
        found.append((loss.detach(), gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys() and all(
        torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1]
    )


class count_calls:
    def __init__(self, owner, name):
        self.owner, self.name, self.function, self.calls = owner, name, getattr(owner, name), []
        setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        self.calls.append(args)
        return self.function(*args, **kwargs)

    def stop(self):
        setattr(self.owner, self.name, self.function)
        return self.calls


def test_a_layer_called_by_itself_under_a_users_own_checkpoint():
    block, x = accelerated(tiny("GPT2")).h[0], torch.randn(2, 7, 36, requires_grad=True)
    (a,) = torch.autograd.grad(first(block(x)).square().sum(), x)
    (b,) = torch.autograd.grad(first(checkpoint(block, x, use_reentrant=False)).square().sum(), x)
    assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["GPT2", "Bert"])
def test_autocast_is_that_of_the_operators_replaced(family):
    theirs = tiny(family)
    ours = accelerated(theirs)
    x, mask = padded(17, 5)
    with torch.autocast("cpu", torch.bfloat16):
        own, other = ours(x, attention_mask=mask)[0], theirs(x, attention_mask=mask)[0]
    assert own.dtype == other.dtype == torch.float32
    truth = copy.deepcopy(theirs).double()(x, attention_mask=mask)[0]
    error, allowed = (((y - truth)[mask.bool()]).square().mean().sqrt() for y in (own, other))
    assert 0 < error <= 2 * allowed


def test_inference_mode_and_accumulation_of_gradients():
    theirs = tiny("Bert", "ForMaskedLM")
    ours = accelerated(theirs).train()
    theirs.train()
    for _ in range(2):
        x = ids(2, 7)
        for model in (ours, theirs):
            model(x, labels=x).loss.backward()
    assert_close_gradients(ours, theirs)
    with torch.inference_mode():
        assert ours.eval()(x).logits.is_inference()


@pytest.mark.parametrize(
    ("family", "head", "one"),
    [
        pytest.param("GPT2", "LMHeadModel", {"n_layer": 1}, marks=pytest.mark.slow),
        ("Bert", "ForMaskedLM", {"num_hidden_layers": 1}),
    ],
)
def test_compiled_whole_with_dynamic_shapes(family, head, one):
    theirs = tiny(family, head, **one).train()
    ours = accelerated(theirs)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, tokens in (((17, 5), 17), ((3, 9, 4), 9)):
        x, mask = padded(*lengths, tokens=tokens)
        labels = x.masked_fill(mask == 0, -100)
        for model in (compiled, theirs):
            model.zero_grad()
            model(x, attention_mask=mask, labels=labels).loss.backward()
        assert_close_gradients(ours, theirs)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(
        compiled(x, attention_mask=mask).logits[mask.bool()],
        theirs(x, attention_mask=mask).logits[mask.bool()],
        **CLOSE,
    )


@pytest.mark.parametrize(("family", "head"), [("GPT2", "LMHeadModel"), ("Bert", "ForMaskedLM")])
def test_exported(family, head):
    theirs = tiny(family, head, use_cache=False)
    ours = accelerated(theirs)
    x, mask = padded(17, 5)
    program = torch.export.export(ours, (x,), {"attention_mask": mask})
    names = {str(node.target) for node in program.graph.nodes}
    assert {
        f"fastlm.{operator}_forward.default" for operator in ("attention", "linear", "gelu_mlp", "layernorm_residual")
    } <= names
    torch.testing.assert_close(
        program.module()(x, attention_mask=mask).logits[mask.bool()],
        theirs(x, attention_mask=mask).logits[mask.bool()],
        **CLOSE,
    )


def test_tracing_and_functional_transforms_see_the_class():
    ours = accelerated(tiny("Bert", return_dict=False))
    x = ids(2, 7)
    traced = torch.jit.trace(ours, (x,), check_trace=False)
    other = ids(2, 7)
    torch.testing.assert_close(traced(other)[0], ours(other)[0], **CLOSE)
    block, y = accelerated(tiny("GPT2")).h[0], torch.randn(3, 5, 36)
    torch.testing.assert_close(torch.func.vmap(lambda row: first(block(row[None]))[0])(y), first(block(y)), **CLOSE)
