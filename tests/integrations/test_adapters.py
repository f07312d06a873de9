"""PEFT's low-rank adapters under `accelerate`: which are computed with their projection, and that all give the same."""

import copy
import io

import pytest
import torch

import fastlm
from fastlm.integrations import adapters
from tests.integrations.support import assert_close_gradients, ids, language_head, tiny

peft = pytest.importorskip("peft", reason="pip install 'fastlm[test]'")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TARGETS = ["q_proj", "v_proj", "down_proj"]
LAYERS = 2
PROJECTIONS = LAYERS * len(TARGETS)


@pytest.fixture
def fused(monkeypatch):
    """A list to which every projection appends that is computed with its adapter."""
    calls, apply = [], adapters.Widened.apply
    monkeypatch.setattr(adapters.Widened, "apply", lambda *a: calls.append(a[0]) or apply(*a))
    return calls


def pair(dtype=torch.float32, change=lambda model: None, family="Llama", sizes=None, **options):
    """(accelerated, PEFT's own) with the same adapters, which are no zeros."""
    config = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS, "init_lora_weights": False, **options}
    torch.manual_seed(0)
    model = tiny(family, language_head(family), **(sizes or {})).to(dtype)
    own = peft.get_peft_model(model, peft.LoraConfig(**config), autocast_adapter_dtype=False)
    change(own)
    accelerated = copy.deepcopy(own)
    fastlm.accelerate(accelerated)
    return accelerated.train(), own.train()


def losses(*models, **inputs):
    torch.manual_seed(2)
    x, found = ids(2, 9), []
    for model in models:
        torch.manual_seed(1)  # of dropout
        found.append(model(input_ids=x, labels=x, **inputs).loss)
    return found


def assert_same_training_step(*models):
    a, b = losses(*models)
    torch.testing.assert_close(a, b, **CLOSE)
    for loss in (a, b):
        loss.backward()
    assert_close_gradients(*models)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dropout": 0.3},
        {"use_rslora": True},
        {"r": 1},
        {"sizes": {"attention_bias": True}},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_a_plain_adapter_is_computed_with_its_projection(options, fused):
    assert_same_training_step(*pair(**options))
    assert len(fused) == PROJECTIONS


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_every_backend_of_the_projection(backend, fused):
    with fastlm.use_backend(backend):
        assert_same_training_step(*pair(sizes={"attention_bias": True}))
    assert len(fused) == PROJECTIONS


def test_conv1d(fused):
    options = {"family": "GPT2", "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    accelerated, own = pair(**options)
    assert_same_training_step(accelerated.eval(), own.eval())
    assert len(fused) == LAYERS * 2


def second_adapter(model):
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def merged(model):
    model.merge_adapter()


def in_half(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"use_dora": True}, 0),
        ({"lora_bias": True}, 0),
        ({"change": second_adapter}, PROJECTIONS - LAYERS),  # of two adapters on q_proj
        ({"change": merged}, 0),
        ({"change": in_half}, 0),
    ],
    ids=["DoRA", "a bias", "two adapters", "merged", "another dtype"],
)
def test_other_adapters_are_computed_by_peft(options, number, fused):
    accelerated, own = pair(**options)
    torch.testing.assert_close(*losses(accelerated, own), **CLOSE)
    assert len(fused) == number


def test_disabled_adapters_and_autocast(fused):
    accelerated, own = pair()
    with accelerated.disable_adapter(), own.disable_adapter():
        torch.testing.assert_close(*losses(accelerated, own), **CLOSE)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(*losses(accelerated, own), rtol=1e-2, atol=1e-2)
    assert not fused


@pytest.mark.parametrize("where", ["lora_A", "lora_B", "base_layer", "lora_dropout"])
def test_hooks_see_the_calls_of_their_modules(where, fused):
    seen = []

    def add_hooks(model):
        for name, module in model.named_modules():
            if f".{where}" in name and not list(module.children()):
                module.register_forward_hook(lambda *call: seen.append(call[2].clone()))

    accelerated, own = pair(lora_dropout=0.1)
    for model in (accelerated, own):
        add_hooks(model)
    torch.testing.assert_close(*losses(accelerated, own), **CLOSE)
    assert len(seen) == 2 * PROJECTIONS
    for a, b in zip(seen[:PROJECTIONS], seen[PROJECTIONS:], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_bfloat16_is_as_exact_as_peft(fused):
    accelerated, own = pair(torch.bfloat16)
    exact = copy.deepcopy(own).double()
    truth, ours, theirs = losses(exact, accelerated, own)
    assert len(fused) == PROJECTIONS
    assert abs(ours - truth) <= 2 * abs(theirs - truth) + 2**-9 * truth


@pytest.mark.parametrize("needed", [(True, True, True), (False, True, True), (True, False, False), (True, False, True)])
@pytest.mark.parametrize("dropped", [False, True])
def test_gradients_can_be_differentiated(needed, dropped):
    """Those of x, A and B, which are all, some or none trained."""
    torch.manual_seed(0)
    w, *rest = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 5), (2, 3, 5), (2, 5), (4, 2)))
    x, a, b = (t.requires_grad_(need) for t, need in zip(rest, needed, strict=True))

    def function(*leaves):
        given = iter(leaves)
        x, a, b = (next(given) if need else t for t, need in zip(rest, needed, strict=True))
        same, narrow = adapters.Narrow.apply(x * 2 if dropped else x, a)
        y = fastlm.linear(same if x.requires_grad and not dropped else x, w)
        return adapters.Widened.apply(y, narrow, b, 0.7)

    leaves = [t for t in (x, a, b) if t.requires_grad]
    torch.testing.assert_close(function(*leaves), x @ w.t() + 0.7 * (x * (1 + dropped)) @ a.t() @ b.t())
    assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)


def test_restore_copies_and_saved_models(fused):
    accelerated, own = pair()
    saved = io.BytesIO()
    torch.save(accelerated, saved)
    saved.seek(0)
    expected = losses(own)[0]
    for model in (copy.deepcopy(accelerated), torch.load(saved, weights_only=False)):
        torch.testing.assert_close(losses(model)[0], expected, **CLOSE)
    assert len(fused) == 2 * PROJECTIONS
    fastlm.restore(accelerated)
    assert not any("forward" in vars(module) for module in accelerated.modules())
    torch.testing.assert_close(losses(accelerated)[0], expected, **CLOSE)
    assert len(fused) == 2 * PROJECTIONS


def test_checkpointing_and_frozen_inputs(fused):
    accelerated, own = pair()
    for model in (accelerated, own):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    assert_same_training_step(accelerated, own)
    assert len(fused) == 2 * PROJECTIONS
