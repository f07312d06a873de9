"""Llama, Mistral, Qwen 2 and 3, SmolLM 3, Gemma 2 and 3: what the other families do not have."""

import copy

import pytest
import torch
import transformers

import fastlm
from fastlm.integrations import attention, layers
from tests.integrations.support import (
    DECODERS,
    accelerated_copy,
    assert_close_gradients,
    assert_within_twice,
    ids,
    tiny,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
OPERATORS = {"attention", "rotary", "linear", "rms_norm_residual", "glu_mlp", "linear_cross_entropy"}
families = pytest.mark.parametrize("family", DECODERS)


def mixed_padding(tokens=17):
    """Three rows: one without padding, one padded on the right, one on the left."""
    x, places = ids(3, tokens), torch.arange(tokens)
    mask = torch.stack([places >= 0, places < 5, places >= 8])
    return x, mask.long()


def plain():
    x = ids(2, 17)
    return {"input_ids": x}, x.masked_fill(torch.rand(2, 17) < 0.3, -100), ...


def with_padding():
    x, mask = mixed_padding()
    # The first real token after padding is no label: hidden states at padding carry no meaning.
    labelled = mask.bool() & (torch.cat([mask[:, :1], mask[:, :-1]], 1) == 1)
    return {"input_ids": x, "attention_mask": mask}, x.masked_fill(~labelled, -100), mask.bool()


@pytest.mark.parametrize(
    ("dtype", "draw"),
    [(torch.float32, plain), (torch.float32, with_padding), (torch.bfloat16, with_padding)],
    ids=["float32", "float32-padded", "bfloat16-padded"],
)
@families
def test_logits_loss_and_gradients(family, dtype, draw):
    exact = "eager" if family == "Gemma2" else "sdpa"
    assert_within_twice(lambda: tiny(family, "ForCausalLM"), draw, dtype, shifted=True, exact_attention=exact)


@families
def test_report(family):
    report = fastlm.report(accelerated_copy(tiny(family, "ForCausalLM")))
    assert not report.left_alone and {entry.operator for entry in report.replaced} == OPERATORS
    norms = sum(entry.operator == "rms_norm_residual" for entry in report.replaced)
    assert norms == 1 + 2 * {"Gemma2": 4, "Gemma3Text": 6, "Qwen3": 4}.get(family, 2)


# Windows, masks and caches


@pytest.mark.parametrize("family", [family for family in DECODERS if family not in ("Llama", "Qwen3", "SmolLM3")])
def test_windows_are_passed_to_the_attention(family, monkeypatch):
    """No mask of tokens × tokens is made for a window, with and without padding."""
    model, (x, mask) = accelerated_copy(tiny(family)), mixed_padding()
    calls, function = [], fastlm.attention
    for module, name in ((attention, "attention_operator"), (layers, "attention")):
        monkeypatch.setattr(module, name, lambda *a, **named: calls.append(named) or function(*a, **named))
    for padding in (None, mask):
        model(x, attention_mask=padding)
    assert len(calls) == 4 and all(call.get("mask") is None for call in calls)
    assert {call.get("window") for call in calls} == ({(4, None)} if family == "Mistral" else {(4, None), None})
    assert [call.get("key_padding") is None for call in calls] == [True, True, False, False]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
        {"num_beams": 2},
    ],
    ids=lambda settings: "-".join(settings) or "dynamic",
)
@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Gemma3Text"])
def test_greedy_tokens_beyond_the_window(family, settings):
    reference = tiny(family, "ForCausalLM")
    accelerated, x = accelerated_copy(reference), ids(3, 9)
    for mask in (None, (torch.arange(9) >= torch.tensor([[0], [4], [8]])).long()):
        inputs = {"input_ids": x, "attention_mask": mask, "max_new_tokens": 9, "do_sample": False, **settings}
        assert torch.equal(accelerated.generate(**inputs), reference.generate(**inputs))


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "SmolLM3", "Gemma2"])
def test_greedy_tokens(family):
    reference, x = tiny(family, "ForCausalLM"), ids(3, 9)
    mask = (torch.arange(9) >= torch.tensor([[0], [4], [8]])).long()
    inputs = {"input_ids": x, "attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(accelerated_copy(reference).generate(**inputs), reference.generate(**inputs))


@families
def test_a_prompt_in_two_parts(family):
    """The second part has keys of the first, some of them outside the window."""
    reference = tiny(family)
    x, results = ids(2, 17), []
    for model in (reference, accelerated_copy(reference)):
        cache = transformers.DynamicCache(config=reference.config)
        first = model(x[:, :8], past_key_values=cache, use_cache=True)[0]
        results.append(torch.cat([first, model(x[:, 8:], past_key_values=cache, use_cache=True)[0]], 1))
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    torch.testing.assert_close(results[1], reference(x)[0], **CLOSE)


def test_packed_sequences():
    """Positions that start again separate the sequences; lengths alone are refused, as before."""
    reference = tiny("Qwen2")
    accelerated, x = accelerated_copy(reference), ids(1, 17)
    positions = torch.cat([torch.arange(7), torch.arange(10)])[None]
    expected = torch.cat([reference(x[:, :7])[0], reference(x[:, 7:])[0]], 1)
    torch.testing.assert_close(accelerated(x, position_ids=positions, use_cache=False)[0], expected, **CLOSE)
    ends = torch.tensor([0, 7, 17], dtype=torch.int32)
    with pytest.raises(fastlm.Unsupported, match="cu_seq_lens_q without position_ids"):
        accelerated(x, cu_seq_lens_q=ends, cu_seq_lens_k=ends)


# What is left to the model and what is not


def assert_same_results(accelerated, reference):
    x, mask = mixed_padding(9)
    for model in (accelerated, reference):
        model.zero_grad()
        model(x, attention_mask=mask)[0][mask.bool()].square().sum().backward()
    torch.testing.assert_close(
        accelerated(x, attention_mask=mask)[0][mask.bool()], reference(x, attention_mask=mask)[0][mask.bool()], **CLOSE
    )
    assert_close_gradients(accelerated, reference)


def soft_capped():
    model = tiny("Gemma2", "ForCausalLM", attn_logit_softcapping=2.0)
    model.set_attn_implementation("eager")  # in transformers 4, "sdpa" ignores the cap
    return model


def test_soft_capped_scores():
    assert_within_twice(soft_capped, with_padding, shifted=True)
    reference, x = soft_capped(), ids(2, 9)
    accelerated, attention_alone = accelerated_copy(reference), copy.deepcopy(reference)
    attention_alone.set_attn_implementation("fastlm")
    inputs = {"input_ids": x, "max_new_tokens": 9, "do_sample": False}
    expected = reference.generate(**inputs)
    assert torch.equal(accelerated.generate(**inputs), expected)
    assert torch.equal(attention_alone.generate(**inputs), expected)
    torch.testing.assert_close(attention_alone(x).logits, reference(x).logits, **CLOSE)
    a, b = (model(x, output_attentions=True).attentions for model in (accelerated, reference))
    torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_pytorch_tanh", "swish"])
def test_activations(activation):
    reference = tiny("Llama", hidden_act=activation)
    accelerated = accelerated_copy(reference)
    assert not fastlm.report(accelerated).left_alone
    assert_same_results(accelerated, reference)


def test_attention_in_both_directions():
    reference = tiny("Gemma3Text", use_bidirectional_attention=True)
    accelerated = accelerated_copy(reference)
    assert not fastlm.report(accelerated).left_alone
    assert_same_results(accelerated, reference)


def test_other_activations_are_not_replaced():
    reference = tiny("Gemma3Text", hidden_activation="relu2")
    accelerated = accelerated_copy(reference)
    left = fastlm.report(accelerated).left_alone
    assert {(entry.operator, entry.reason) for entry in left} == {
        ("glu_mlp", "mlp.act_fn is not a plain SiLU, GELU or ReLU")
    }
    assert_same_results(accelerated, reference)


def test_modules_of_other_families_and_of_users_are_called():
    """A norm of Gemma in a Llama, attention of Qwen in a Llama, and a subclass that changes what forward calls."""
    for family in ("Gemma2", "Qwen3"):  # their classes are known, then
        accelerated_copy(tiny(family))
    reference = tiny("Llama")
    gemma, qwen = tiny("Gemma2").layers[0].input_layernorm, tiny("Qwen3", head_dim=12).layers[1].self_attn
    qwen.config = reference.config
    reference.layers[0].input_layernorm, reference.layers[1].self_attn = gemma, qwen
    reference.layers[1].mlp.__class__ = type("Twice", (type(reference.layers[1].mlp),), {"forward": twice})
    accelerated = accelerated_copy(reference)
    assert {(entry.module, entry.reason) for entry in fastlm.report(accelerated).left_alone} == {
        ("layers.0.input_layernorm", "is a Gemma2RMSNorm"),
        ("layers.1.mlp", "is a Twice"),
        *(
            (f"layers.1.self_attn{name}", "is a Qwen3Attention")
            for name in ("", ".q_proj", ".k_proj", ".v_proj", ".o_proj")
        ),
    }
    assert_same_results(accelerated, reference)
    reference = tiny("Gemma3Text")
    norm = reference.layers[0].self_attn.q_norm
    norm.__class__ = type("Doubled", (type(norm),), {"_norm": lambda self, x: 2 * type(self).__mro__[1]._norm(self, x)})
    accelerated = accelerated_copy(reference)
    assert {entry.reason for entry in fastlm.report(accelerated).left_alone} == {"is a Doubled"}
    assert_same_results(accelerated, reference)


def twice(self, x):
    return 2 * type(self).__mro__[1].forward(self, x)


def test_text_models_inside_models_of_text_and_images():
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=DECODERS["Gemma3Text"], vision_config=vision, mm_tokens_per_image=4, image_token_index=1
    )
    torch.manual_seed(0)
    reference = transformers.Gemma3ForConditionalGeneration(config).eval()
    accelerated = accelerated_copy(reference)
    report = fastlm.report(accelerated)
    assert not report.left_alone and {entry.operator for entry in report.replaced} == OPERATORS - {
        "linear_cross_entropy"
    }
    x, mask = mixed_padding(13)
    x[:, 3:7] = 1  # an image, whose tokens attend to each other
    pixels = torch.randn(3, 3, 28, 28)
    mask[1, 5:] = 1
    kinds = (x == 1).long()
    actual, expected = (
        model(x, pixel_values=pixels, token_type_ids=kinds).logits for model in (accelerated, reference)
    )
    torch.testing.assert_close(actual, expected, **CLOSE)


# LoRA


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "v_proj"]], ids=["all", "q and v"])
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_lora(family, targets, order):
    """Adapters are neither dropped nor merged, and only they get gradients."""
    peft = pytest.importorskip("peft", reason="pip install 'fastlm[test]'")
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, lora_dropout=0.0)
    reference, adapted = tiny(family, "ForCausalLM"), []
    for accelerates in (True, False):
        model = copy.deepcopy(reference)
        if accelerates and order == "before":
            fastlm.accelerate(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config).train()
        if accelerates and order == "after":
            fastlm.accelerate(model)
        adapted.append(model)
    left = fastlm.report(adapted[0]).left_alone
    assert {entry.operator for entry in left} == ({"linear", "glu_mlp"} if targets == TARGETS else {"linear"})
    assert len(left) == (2 * 5 if targets == TARGETS else 2 * 2) and all("is a Linear" in x.reason for x in left)
    x, mask = mixed_padding()
    for model in adapted:
        model(input_ids=x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100)).loss.backward()
    assert_close_gradients(*adapted)
    bases = [module for name, module in adapted[0].named_modules() if name.endswith("base_layer")]
    assert len(bases) == 2 * len(targets) and all(
        type(vars(base)["forward"]) is layers.BaseLayerPatch for base in bases
    )
    for name, p in adapted[0].named_parameters():
        assert (p.grad is not None) is ("lora_" in name) is p.requires_grad
    with adapted[0].disable_adapter(), torch.no_grad():
        actual = adapted[0].eval()(input_ids=x).logits
    torch.testing.assert_close(actual, reference(x).logits, **CLOSE)
    merged = adapted[0].merge_and_unload()
    assert not fastlm.report(merged).left_alone and not any("forward" in vars(base) for base in bases)
    torch.testing.assert_close(merged(x).logits, adapted[1].eval()(input_ids=x).logits, rtol=1e-3, atol=1e-4)


def test_frozen_weights_have_no_gradient_buffer():
    """In a training step with adapters nothing as large as a frozen weight is allocated."""
    peft = pytest.importorskip("peft", reason="pip install 'fastlm[test]'")
    sizes = {"hidden_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 100}
    reference, x, largest = tiny("Llama", "ForCausalLM", attention_bias=False, **sizes), ids(1, 5), []
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    for model in (accelerated_copy(reference), peft.get_peft_model(accelerated_copy(reference), config)):
        model.train()(input_ids=x, labels=x).loss.backward()  # allocates caches
        model.zero_grad()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(input_ids=x, labels=x).loss.backward()
        largest.append(max(event.self_cpu_memory_usage for event in profile.events()))
    trained, adapted = largest
    assert adapted < reference.model.layers[0].self_attn.k_proj.weight.nbytes <= trained


# Precision


def test_a_model_in_bfloat16_under_autocast():
    """With dropout: gradients are finite and of the right dtype."""
    model = accelerated_copy(tiny("Qwen3", "ForCausalLM", attention_dropout=0.2).to(torch.bfloat16)).train()
    x = ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        model(x, labels=x).loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


def test_norms_in_float32_in_a_model_in_bfloat16():
    """As PEFT prepares quantized models for training."""
    reference, x = tiny("Llama").to(torch.bfloat16), ids(2, 9)
    for module in reference.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.float()
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = accelerated_copy(reference)(x)[0], reference(x)[0]
    assert actual.dtype == expected.dtype == torch.float32
    assert (actual - expected).norm() < 2**-6 * expected.norm()


def test_attention_dropout():
    model, x = accelerated_copy(tiny("Llama", attention_dropout=0.4)), ids(2, 9)
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    torch.manual_seed(3)
    first, second = model(x)[0], model(x)[0]
    torch.manual_seed(3)
    assert torch.equal(first, model(x)[0]) and not torch.equal(first, second)
