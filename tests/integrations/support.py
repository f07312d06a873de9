"""Shared by the tests of integrations: small models of every family, and the 2 × error rule for accelerated models."""

import copy
import importlib

import torch
import transformers

import fastlm
from fastlm.benchmarking.accuracy import KeepFloat64
from tests.models.hugging_face import (
    DRAWS,
    KEY_BIASES,
    Errors,
    errors_of,
    lively,
    ours_on,
    theirs_on,
)

V5 = int(transformers.__version__.partition(".")[0]) >= 5
VOCAB = 131
BERT = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 48,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
}
DROPOUTS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": 48,
    "n_embd": 36,
    "n_layer": 2,
    "n_head": 3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DISTILBERT = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 48,
    "dim": 36,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 80,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
DECODER = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 48,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 80,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GEMMA = DECODER | {
    "head_dim": 16,
    "sliding_window": 5,
    "query_pre_attn_scalar": 20,
    "layer_types": ["sliding_attention", "full_attention"],
    "final_logit_softcapping": 4.0,
}
DECODERS = {
    "Llama": DECODER | {"attention_bias": True, "mlp_bias": True},
    "Mistral": DECODER | {"sliding_window": 5},
    "Qwen2": DECODER | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": DECODER | {"head_dim": 16},
    "SmolLM3": DECODER | {"no_rope_layer_interval": 2},
    "Gemma2": GEMMA | {"attn_logit_softcapping": None},
    "Gemma3Text": GEMMA,
}
MODERNBERT = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 48,
    "hidden_size": 36,
    "num_hidden_layers": 4,  # the first and the last are global, those between have a window
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "local_attention": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
} | ({} if V5 else {"reference_compile": False})  # transformers 4 writes it to the configuration at the first call
# BERT's sizes; transformers 4 does not have them.
ROTARY_ENCODERS = {
    "EuroBert": BERT | {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "Gte": BERT | DROPOUTS | {"type_vocab_size": 2, "pad_token_id": 0},
    "NomicBert": BERT | DROPOUTS,
    "JinaEmbeddingsV3": BERT | DROPOUTS | {"pad_token_id": 0},
}
SETTINGS = {
    "GPT2": GPT2,
    "Bert": BERT | DROPOUTS,
    "Roberta": BERT | DROPOUTS,
    "XLMRoberta": BERT | DROPOUTS,
    "Camembert": BERT | DROPOUTS,
    "Electra": BERT | DROPOUTS | {"embedding_size": 20},
    "DistilBert": DISTILBERT,
    "MPNet": BERT | DROPOUTS,
    "ModernBert": MODERNBERT,
    **{name: settings for name, settings in ROTARY_ENCODERS.items() if hasattr(transformers, f"{name}Config")},
    **DECODERS,
}
ENCODERS = [family for family in SETTINGS if family != "GPT2" and family not in DECODERS]


def config_class(family):
    return getattr(transformers, f"{family}Config")


def model_class(family, head="Model"):
    name = f"{family}{head}"
    return getattr(transformers, "Gemma3ForCausalLM" if name == "Gemma3TextForCausalLM" else name)


def language_head(family):
    return {"GPT2": "LMHeadModel"}.get(family, "ForCausalLM" if family in DECODERS else "ForMaskedLM")


def tiny(family, head="Model", **changes):
    """A model of transformers in eval mode, without dropout unless `changes` set it."""
    config = config_class(family)(**{**SETTINGS[family], **changes})
    return lively(model_class(family, head)(config))


def classes_of(family):
    """The suffixes of all model classes of a family in transformers: the base model and every head."""
    home = importlib.import_module(model_class(family).__module__)
    models = [
        kind
        for name, kind in vars(home).items()
        if isinstance(kind, type)
        and issubclass(kind, transformers.PreTrainedModel)
        and name in home.__all__
        and kind.config_class is config_class(family)  # not a model of text and images
        and not name.endswith("PreTrainedModel")
    ]
    return [kind.__name__.removeprefix(family).removeprefix("Gemma3") for kind in models]


def accelerated_copy(model, **options):
    """A copy of the model, accelerated."""
    return fastlm.accelerate(copy.deepcopy(model), **options)


def ids(*shape):
    return torch.randint(5, VOCAB, shape)


def padded(*lengths, tokens=17):
    """(input_ids, attention_mask) of right-padded sequences of these lengths."""
    return ids(len(lengths), tokens), (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close_gradients(model, reference):
    """The same parameters have gradients, and these agree. Biases of keys are skipped: their exact gradient is 0."""
    actual, expected = gradients(model), gradients(reference)
    assert actual.keys() == expected.keys() and actual
    for name in actual:
        if not name.endswith(KEY_BIASES):
            atol = 1e-5 * max(1.0, expected[name].abs().max().item())
            torch.testing.assert_close(
                actual[name], expected[name], rtol=1e-3, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
            )


def assert_within_twice(make, draw, dtype=torch.float32, shifted=False, draws=DRAWS, exact_attention="eager"):
    """The error of an accelerated model against float64 is at most twice that of the same model as it comes.

    make() returns a model with a language-model head. draw() returns inputs, labels, and an index of the logits to
    compare. exact_attention: transformers' implementation in float64. Some families' eager one gives NaN for padding.
    """
    evaluated, trained = Errors(dtype), Errors(dtype)
    for _ in range(draws):
        reference, (inputs, labels, where) = make().to(dtype), draw()
        exact_model = copy.deepcopy(reference).double()
        exact_model.set_attn_implementation(exact_attention)
        accelerated = accelerated_copy(reference)
        assert not fastlm.report(accelerated).left_alone
        with KeepFloat64():
            exact = theirs_on(exact_model, inputs, labels, where, shifted)
        allowed = errors_of(theirs_on(reference, inputs, labels, where, shifted), exact)
        evaluated.add(errors_of(theirs_on(accelerated.eval(), inputs, labels, where, shifted), exact), allowed)
        del allowed["logits"]
        trained.add(errors_of(ours_on(accelerated.train(), inputs, labels, where), exact), allowed)
    evaluated.judge()
    trained.judge()
