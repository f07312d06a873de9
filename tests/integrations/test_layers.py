"""Layers of every family against transformers: outputs, dropout, hooks, adapters, checkpointing, compilation."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.integrations import parts
from tests.integrations.support import (
    DECODERS,
    ENCODERS,
    SETTINGS,
    accelerated_copy,
    assert_close_gradients,
    assert_within_twice,
    classes_of,
    gradients,
    ids,
    language_head,
    padded,
    tiny,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
DTYPES = [torch.float32, torch.bfloat16]
VARIANTS = {
    "exact GELU": {"activation_function": "gelu"},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "not scaled": {"scale_attn_weights": False},
    "another n_inner and epsilon": {"n_inner": 50, "n_head": 1, "layer_norm_epsilon": 1e-3},
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
    """Outputs and gradients match those of the original model, with padding that encoders remove."""
    settings = {"is_decoder": True} if head in ("LMHeadModel", "ForCausalLM") and family in ENCODERS else {}
    reference = tiny(family, head, **settings)
    accelerated = accelerated_copy(reference)
    assert not fastlm.report(accelerated).left_alone
    x, mask = padded(11, 5, 9, 3)
    if family in DECODERS:  # a classifier finds the last token by the padding's index
        x = x.masked_fill(mask == 0, reference.config.pad_token_id)
    if head in ("ForMultipleChoice", "DoubleHeadsModel"):
        x, mask = x.view(2, 2, -1), mask.view(2, 2, -1)
    for model in (accelerated, reference):
        model.zero_grad()
        results = [result for result in model(x, attention_mask=mask).to_tuple() if isinstance(result, torch.Tensor)]
        seen = [result[mask.bool()] if result.shape[: mask.dim()] == mask.shape else result for result in results]
        sum(result.square().mean() for result in seen).backward()
        if model is accelerated:
            actual = seen
    assert len(actual) == len(seen) > 0
    for a, b in zip(actual, seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert_close_gradients(accelerated, reference)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_gpt2_configurations(changes):
    assert_within_twice(lambda: tiny("GPT2", "LMHeadModel", **changes), plain, shifted=True)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
def test_decoders_of_bert_are_causal(family):
    reference = tiny(family, "LMHeadModel" if family == "Bert" else "ForCausalLM", is_decoder=True)
    accelerated = accelerated_copy(reference)
    x, mask = padded(17, 5)
    torch.testing.assert_close(
        accelerated(x, attention_mask=mask).logits[mask.bool()],
        reference(x, attention_mask=mask).logits[mask.bool()],
        **CLOSE,
    )
    changed = x.clone()
    changed[:, 9:] = 7
    assert torch.equal(accelerated(x).logits[:, :9], accelerated(changed).logits[:, :9])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "head"), [("Bert", "LMHeadModel"), ("GPT2", "LMHeadModel")])
def test_cross_attention_runs_the_original_forward(family, head, implementation):
    reference = tiny(family, head, is_decoder=True, add_cross_attention=True)
    reference.set_attn_implementation(implementation)
    accelerated, x = accelerated_copy(reference), ids(2, 7)
    encoded, seen = torch.randn(2, 5, 36), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    arguments = {"encoder_hidden_states": encoded, "encoder_attention_mask": seen}
    torch.testing.assert_close(accelerated(x, **arguments).logits, reference(x, **arguments).logits, **CLOSE)


# Dropout


@pytest.mark.parametrize("name", ["resid_pdrop", "attn_pdrop"])
def test_dropout_of_pre_norm_layers(name):
    """Mean and standard deviation over many samples match transformers."""
    assert_same_distribution(tiny("GPT2", **{name: 0.5}), {})


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_of_post_norm_layers(name):
    """With padding, so that the layers run packed."""
    assert_same_distribution(tiny("Bert", **{name: 0.5}), {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])})


@pytest.mark.parametrize("name", ["attention_dropout", "mlp_dropout"])
def test_dropout_of_layers_with_a_window(name):
    assert_same_distribution(tiny("ModernBert", **{name: 0.5}), {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])})


@pytest.mark.skipif("Gte" not in SETTINGS, reason="this version of transformers has no GTE")
def test_dropout_beside_modules_that_are_called():
    """A hook makes the attention and the MLP be called; the layer drops what they return."""
    reference = tiny("Gte", hidden_dropout_prob=0.5)
    for module in (reference.layers[0].self_attn, reference.layers[1].mlp):
        module.register_forward_hook(lambda module, args, out: None)
    assert_same_distribution(reference, {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])})


def assert_same_distribution(reference, inputs, draws=3000):
    accelerated = accelerated_copy(reference).train()
    for model in (reference.train(), accelerated):  # no dropout of embeddings: only the layers are compared
        model.get_submodule(
            {"gpt2": "drop", "bert": "embeddings.dropout"}.get(model.config.model_type, "embeddings")
        ).eval()
    x = ids(1, 6).expand(draws, -1)
    inputs = {key: value.expand(draws, -1) for key, value in inputs.items()}
    with torch.no_grad():
        actual, expected = accelerated(x, **inputs).last_hidden_state, reference(x, **inputs).last_hidden_state
    if inputs:
        actual, expected = actual[:, :4], expected[:, :4]
    deviation = expected.std(0)
    assert deviation.min() > 0.01
    torch.testing.assert_close(actual.std(0), deviation, rtol=0.15, atol=0.0)
    standard_error = (2 / draws) ** 0.5  # of the difference, relative to the deviation
    assert ((actual.mean(0) - expected.mean(0)) / deviation).abs().max() < 5 * standard_error


def test_dropout_differs_between_calls_and_repeats_with_the_seed():
    for family, names in (("GPT2", ("resid_pdrop", "attn_pdrop")), ("DistilBert", ("dropout", "attention_dropout"))):
        for name in names:
            model, x = accelerated_copy(tiny(family, **{name: 0.3})), ids(2, 7)
            assert torch.equal(model(x)[0], model(x)[0])
            model.train()
            torch.manual_seed(3)
            first, second = model(x)[0], model(x)[0]
            torch.manual_seed(3)
            assert torch.equal(first, model(x)[0]) and not torch.equal(first, second)


def test_modules_in_eval_mode_apply_no_dropout():
    model = accelerated_copy(tiny("Bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or "SelfAttention" in type(module).__name__:
            module.eval()
    assert torch.equal(model(x := ids(2, 7))[0], model(x)[0])


# Hooks and adapters that are added after accelerate


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
    "MPNet": (
        "encoder.layer.0",
        "encoder.layer.0.attention",
        "encoder.layer.0.attention.attn",
        "encoder.layer.0.attention.attn.o",
        "encoder.layer.0.attention.dropout",
        "encoder.layer.0.attention.LayerNorm",
        "encoder.layer.0.output",
    ),
    "ModernBert": (
        "layers.0.attn_norm",
        "layers.1",
        "layers.1.attn_norm",
        "layers.1.attn",
        "layers.1.attn.Wqkv",
        "layers.1.attn.Wo",
        "layers.1.attn.out_drop",
        "layers.1.mlp_norm",
        "layers.1.mlp",
        "layers.1.mlp.Wi",
        "layers.1.mlp.act",
        "layers.1.mlp.drop",
        "layers.1.mlp.Wo",
    ),
    "Gte": (
        "layers.0",
        "layers.0.self_attn",
        "layers.0.self_attn.v_proj",
        "layers.0.self_attn.o_proj",
        "layers.0.post_attention_dropout",
        "layers.0.post_attention_layernorm",
        "layers.0.mlp",
        "layers.0.mlp.up_proj",
        "layers.0.mlp.dropout",
        "layers.0.post_mlp_dropout",
        "layers.0.post_mlp_layernorm",
    ),
    "Gemma3Text": (
        "layers.0",
        "layers.0.input_layernorm",
        "layers.0.self_attn",
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.k_norm",
        "layers.0.self_attn.o_proj",
        "layers.0.post_attention_layernorm",
        "layers.0.pre_feedforward_layernorm",
        "layers.0.mlp",
        "layers.0.mlp.gate_proj",
        "layers.0.mlp.act_fn",
        "layers.0.post_feedforward_layernorm",
    ),
}
CASES = [(family, place) for family, places in PLACES.items() if family in SETTINGS for place in places]


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.parametrize(("family", "place"), CASES, ids=[f"{family}-{place}" for family, place in CASES])
def test_a_hook_on_any_module_is_called(family, place, kind):
    reference = tiny(family)
    accelerated = accelerated_copy(reference)
    x, mask = padded(7, 7, tokens=7) if family == "GPT2" else padded(7, 4, tokens=7)
    results = []
    for model in (reference, accelerated):
        model(x, attention_mask=mask)  # a call before the hook is added
        module, seen = model.get_submodule(place), []
        handle = add_hook(module, kind, seen.append)
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
    assert not fastlm.report(accelerated).left_alone  # the hook was removed


def add_hook(module, kind, take):
    if kind == "forward":
        return module.register_forward_hook(lambda module, args, out: take(first(out).detach()))
    if kind == "pre":
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: take(first((*args, *kwargs.values())).detach()), with_kwargs=True
        )
    return module.register_full_backward_hook(lambda module, before, after: take(first(after).detach()))


def first(x):
    return next(item for item in x if item is not None) if isinstance(x, tuple) else x


def test_a_hook_may_change_the_output():
    for family, place in CASES:
        model = accelerated_copy(tiny(family))
        x = ids(2, 7)
        before = model(x)[0]
        # Not by a factor: norms that follow would cancel it.
        squared = lambda module, args, out: (out[0] ** 2, *out[1:]) if isinstance(out, tuple) else out**2  # noqa: E731
        module = model.get_submodule(place)
        handle = module.register_forward_hook(squared)
        assert not torch.allclose(before, model(x)[0], rtol=1e-3), (family, place)
        handle.remove()
        assert torch.equal(before, model(x)[0])
        module._forward_hooks[-1] = squared  # not through PyTorch's API
        assert not torch.allclose(before, model(x)[0], rtol=1e-3), (family, place)
        module._forward_hooks.clear()


@pytest.mark.parametrize("change", ["forward", "class", "parametrization", "weight"])
def test_a_module_that_is_changed_later_is_called(change):
    """Changes without a hook: of the forward, the class, the weight by a parametrization, the weight's tensor type."""

    class Doubled(torch.Tensor):
        """A tensor subclass as sharding and quantization use: only PyTorch's operators interpret it."""

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
        model = accelerated_copy(tiny(family))
        x, module = ids(2, 7), model.get_submodule(place)
        before, kind, weight = model(x)[0], type(module), module.weight
        if change == "forward":
            module.forward = lambda x, module=module: type(module).forward(module, x) * 2
        elif change == "class":
            module.__class__ = type("Other", (kind,), {"forward": lambda self, x, kind=kind: kind.forward(self, x) * 2})
        elif change == "parametrization":
            nn.utils.parametrize.register_parametrization(module, "weight", nn.Softplus())
        else:
            module._parameters["weight"] = weight.detach().as_subclass(Doubled)
        assert not torch.allclose(model(x)[0], before, rtol=1e-2), (family, change)
        if change == "forward":
            del module.forward
        elif change == "class":
            module.__class__ = kind
        elif change == "parametrization":
            nn.utils.parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        else:
            module._parameters["weight"] = weight
        assert torch.equal(model(x)[0], before)


def test_a_global_hook_is_called_for_every_module():
    reference, seen = tiny("Bert"), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen[-1].append(type(module)))
    try:
        for model in (reference, accelerated_copy(reference)):
            seen.append([])
            model(ids(1, 5))
    finally:
        handle.remove()
    assert seen[0] == seen[1]


class Adapter(nn.Module):
    """A low-rank adapter of a projection. test_transformers.py tests PEFT's adapters."""

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
def test_an_adapter_is_called_and_the_other_parts_stay_fused(family, place, width, out, operators):
    reference = tiny(family)
    accelerated = accelerated_copy(reference)
    adapter = Adapter(None, width, out)
    for model in (reference, accelerated):
        owner, _, name = place.rpartition(".")
        inserted = copy.deepcopy(adapter)
        inserted.inner = model.get_submodule(place)
        setattr(model.get_submodule(owner), name, inserted)
    x, mask = padded(7, 4, tokens=7)
    for model in (reference, accelerated):
        model(x, attention_mask=mask)[0][mask.bool()].square().sum().backward()
    assert_close_gradients(accelerated, reference)
    left = fastlm.report(accelerated).left_alone
    assert {entry.operator for entry in left} == operators and all("Adapter" in entry.reason for entry in left)


def test_other_activations_are_not_replaced():
    for changes, reason in (
        ({"hidden_act": "relu"}, "intermediate.intermediate_act_fn is not a plain GELU"),
        ({"hidden_act": "gelu_10"}, "not a plain GELU"),
    ):
        reference = tiny("Bert", **changes)
        accelerated, x = accelerated_copy(reference), ids(2, 7)
        torch.testing.assert_close(accelerated(x)[0], reference(x)[0], **CLOSE)
        assert all(
            reason in entry.reason and entry.operator == "gelu_mlp" for entry in fastlm.report(accelerated).left_alone
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantized_projections_are_not_replaced():
    quantized = torch.ao.quantization.quantize_dynamic(tiny("Bert"), {nn.Linear})
    accelerated, x = accelerated_copy(quantized), ids(2, 7)
    torch.testing.assert_close(accelerated(x)[0], quantized(x)[0], **CLOSE)
    report = fastlm.report(accelerated)
    assert {entry.operator for entry in report.left_alone} == {"linear", "gelu_mlp"}
    assert {entry.operator for entry in report.replaced} == {"attention", "layernorm_residual"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_pruned_projections_are_not_replaced(when):
    reference, places = tiny("Bert"), ("encoder.layer.0.attention.self.key", "encoder.layer.1.output.dense")
    accelerated = copy.deepcopy(reference)
    if when == "after":
        fastlm.accelerate(accelerated)
    for model in (reference, accelerated):
        for place in places:
            prune.random_unstructured(model.get_submodule(place), "weight", 0.5)
    accelerated.load_state_dict(reference.state_dict())
    if when == "before":
        fastlm.accelerate(accelerated)
    x, mask = padded(7, 4, tokens=7)
    for model in (accelerated, reference):
        model(x, attention_mask=mask)[0][mask.bool()].square().sum().backward()
    assert_close_gradients(accelerated, reference)
    left = fastlm.report(accelerated).left_alone
    # Pruning uses hooks, which prevent packing.
    assert [entry.operator for entry in left] == ["attention", "linear", "gelu_mlp"]
    assert left[1].module == places[0] and left[2].module.startswith("encoder.layer.1.")
    for place in places:
        prune.remove(accelerated.get_submodule(place), "weight")
    assert not fastlm.report(accelerated).left_alone


# Checkpointing, autocast, compilation, tracing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["GPT2", "Bert", "DistilBert", "Qwen2", "ModernBert"])
def test_checkpointing_is_bit_identical(family, reentrant):
    """With dropout, padding, and the loss."""
    dropouts = {
        "GPT2": {"resid_pdrop": 0.2, "attn_pdrop": 0.2},
        "Bert": {"hidden_dropout_prob": 0.2},
        "DistilBert": {"dropout": 0.2},
        "Qwen2": {"attention_dropout": 0.2},
        "ModernBert": {"attention_dropout": 0.2},
    }[family]
    model = accelerated_copy(tiny(family, language_head(family), **dropouts)).train()
    x, mask = padded(17, 5, 9)
    found = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        counted = CallCounter(parts, "glu_mlp" if family in ("Qwen2", "ModernBert") else "gelu_mlp")
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100)).loss
        loss.backward()
        # Recomputed in the backward pass.
        assert len(counted.stop()) == model.config.num_hidden_layers * (2 if on else 1)
        found.append((loss.detach(), gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys() and all(
        torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1]
    )


class CallCounter:
    def __init__(self, owner, name):
        self.owner, self.name, self.function, self.calls = owner, name, getattr(owner, name), []
        setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        self.calls.append(args)
        return self.function(*args, **kwargs)

    def stop(self):
        setattr(self.owner, self.name, self.function)
        return self.calls


def test_a_layer_inside_torch_checkpoint():
    block, x = accelerated_copy(tiny("GPT2")).h[0], torch.randn(2, 7, 36, requires_grad=True)
    (a,) = torch.autograd.grad(first(block(x)).square().sum(), x)
    (b,) = torch.autograd.grad(first(checkpoint(block, x, use_reentrant=False)).square().sum(), x)
    assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["GPT2", "Bert", "Qwen3", "Gemma3Text", "ModernBert"])
def test_autocast_matches_the_replaced_operators(family):
    reference = tiny(family)
    accelerated = accelerated_copy(reference)
    x, mask = padded(17, 5)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = accelerated(x, attention_mask=mask)[0], reference(x, attention_mask=mask)[0]
    assert actual.dtype == expected.dtype == torch.float32
    exact = copy.deepcopy(reference).double()(x, attention_mask=mask)[0]
    error, allowed = (((y - exact)[mask.bool()]).square().mean().sqrt() for y in (actual, expected))
    assert 0 < error <= 2 * allowed


def test_inference_mode_and_gradient_accumulation():
    reference = tiny("Bert", "ForMaskedLM")
    accelerated = accelerated_copy(reference).train()
    reference.train()
    for _ in range(2):
        x = ids(2, 7)
        for model in (accelerated, reference):
            model(x, labels=x).loss.backward()
    assert_close_gradients(accelerated, reference)
    with torch.inference_mode():
        assert accelerated.eval()(x).logits.is_inference()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "head", "one"),
    [
        pytest.param("GPT2", "LMHeadModel", {"n_layer": 1}, marks=pytest.mark.nightly),
        ("Bert", "ForMaskedLM", {"num_hidden_layers": 1}),
        pytest.param("ModernBert", "ForMaskedLM", {"num_hidden_layers": 2}, marks=pytest.mark.nightly),
        pytest.param(
            "Gemma3Text",
            "ForCausalLM",
            {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_compile_fullgraph_with_dynamic_shapes(family, head, one):
    reference = tiny(family, head, **one).train()
    accelerated = accelerated_copy(reference)
    compiled = torch.compile(accelerated, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, tokens in (((17, 5), 17), ((3, 9, 4), 9)):
        x, mask = padded(*lengths, tokens=tokens)
        labels = x.masked_fill(mask == 0, -100)
        for model in (compiled, reference):
            model.zero_grad()
            model(x, attention_mask=mask, labels=labels).loss.backward()
        assert_close_gradients(accelerated, reference)
    accelerated.eval(), reference.eval()
    torch.testing.assert_close(
        compiled(x, attention_mask=mask).logits[mask.bool()],
        reference(x, attention_mask=mask).logits[mask.bool()],
        **CLOSE,
    )


@pytest.mark.parametrize(
    ("family", "head", "operators"),
    [
        ("GPT2", "LMHeadModel", {"attention", "linear", "gelu_mlp", "layernorm_residual"}),
        ("Bert", "ForMaskedLM", {"attention", "linear", "gelu_mlp", "layernorm_residual"}),
        ("Qwen3", "ForCausalLM", {"attention", "linear", "glu_mlp", "rms_norm_residual", "rotary"}),
        ("ModernBert", "ForMaskedLM", {"attention", "linear", "glu_mlp", "layernorm_residual", "rotary"}),
    ],
)
def test_export(family, head, operators):
    reference = tiny(family, head, use_cache=False)
    accelerated = accelerated_copy(reference)
    x, mask = padded(17, 5)
    program = torch.export.export(accelerated, (x,), {"attention_mask": mask})
    names = {str(node.target) for node in program.graph.nodes}
    assert {f"fastlm.{operator}_forward.default" for operator in operators} <= names
    torch.testing.assert_close(
        program.module()(x, attention_mask=mask).logits[mask.bool()],
        reference(x, attention_mask=mask).logits[mask.bool()],
        **CLOSE,
    )


def test_tracing_and_functional_transforms_run_the_original_forward():
    accelerated = accelerated_copy(tiny("Bert", return_dict=False))
    x = ids(2, 7)
    traced = torch.jit.trace(accelerated, (x,), check_trace=False)
    y = ids(2, 7)
    torch.testing.assert_close(traced(y)[0], accelerated(y)[0], **CLOSE)
    block, y = accelerated_copy(tiny("GPT2")).h[0], torch.randn(3, 5, 36)
    torch.testing.assert_close(torch.func.vmap(lambda row: first(block(row[None]))[0])(y), first(block(y)), **CLOSE)
