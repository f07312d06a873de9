"""What the tests of integrations share: a small model of every family, and the 2 × rule for an accelerated model against the same model left alone."""

import copy
import importlib

import torch
import transformers

import fastlm
from tests.models.hugging_face import DRAWS, KEY_BIASES, Errors, errors_of, lively, ours_on, theirs_on

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
SETTINGS = {
    "GPT2": GPT2,
    "Bert": BERT | DROPOUTS,
    "Roberta": BERT | DROPOUTS,
    "XLMRoberta": BERT | DROPOUTS,
    "Camembert": BERT | DROPOUTS,
    "Electra": BERT | DROPOUTS | {"embedding_size": 20},
    "DistilBert": DISTILBERT,
}
ENCODERS = [family for family in SETTINGS if family != "GPT2"]


def tiny(family, head="Model", **changes):
    """A model of transformers with lively weights, in eval mode, without dropout unless `changes` say so."""
    config = getattr(transformers, f"{family}Config")(**{**SETTINGS[family], **changes})
    return lively(getattr(transformers, f"{family}{head}")(config))


def classes_of(family):
    """All models of a family that transformers has: bare, and with every head."""
    home = importlib.import_module(getattr(transformers, f"{family}Model").__module__)
    models = [
        kind
        for name, kind in vars(home).items()
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and name in home.__all__
    ]
    return [kind.__name__.removeprefix(family) for kind in models if not kind.__name__.endswith("PreTrainedModel")]


def accelerated(model, **options):
    """An accelerated copy."""
    return fastlm.accelerate(copy.deepcopy(model), **options)


def ids(*shape):
    return torch.randint(5, VOCAB, shape)


def padded(*lengths, tokens=17):
    """(input_ids, attention_mask) of sequences of these lengths, the padding behind them."""
    return ids(len(lengths), tokens), (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close_gradients(model, other):
    """The same parameters have gradients, the same to a few roundings. A key's bias, whose gradient is rounding alone, is set aside."""
    own, their = gradients(model), gradients(other)
    assert own.keys() == their.keys() and own
    for name in own:
        if not name.endswith(KEY_BIASES):
            near = 1e-5 * max(1.0, their[name].abs().max().item())
            torch.testing.assert_close(
                own[name], their[name], rtol=1e-3, atol=near, msg=lambda m, name=name: f"{name}: {m}"
            )


def assert_within_twice(make, draw, dtype=torch.float32, shifted=False, draws=DRAWS):
    """make() → a model with a language-model head; draw() → (inputs, labels, where the logits mean something)."""
    evaluated, trained = Errors(dtype), Errors(dtype)
    for _ in range(draws):
        theirs, (inputs, labels, where) = make().to(dtype), draw()
        truth = copy.deepcopy(theirs).double()
        truth.set_attn_implementation("eager")
        ours = accelerated(theirs)
        assert not fastlm.report(ours).left_alone
        true = theirs_on(truth, inputs, labels, where, shifted)
        rival = errors_of(theirs_on(theirs, inputs, labels, where, shifted), true)
        evaluated.add(errors_of(theirs_on(ours.eval(), inputs, labels, where, shifted), true), rival)
        del rival["logits"]
        trained.add(errors_of(ours_on(ours.train(), inputs, labels, where), true), rival)
    evaluated.judge()
    trained.judge()
