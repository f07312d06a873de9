"""The public functions and a right call of each, which tests change one argument at a time.

An operator comes with its definition in plain PyTorch: a changed call that it accepts must have the definition's
result. Of the other functions an accepted argument must be of its type hint.
"""

import dataclasses
import functools
import inspect
import itertools
import math
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastlm
from fastlm import models
from fastlm.generation.predict import predict
from fastlm.models.decoding import Sampling


@dataclasses.dataclass(frozen=True)
class Function:
    name: str
    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]  # of a right call; floating-point tensors in float32
    definition: Callable[..., Any] | None = None  # the same arguments in float64
    signature: Callable[..., Any] | None = None  # whose type hints count, if not those of call
    tables: tuple[str, ...] = ()  # arguments in float32 (float64 for float64) that get no gradient
    names: dict[str, str] = dataclasses.field(default_factory=dict)  # of arguments in error messages, if others

    @functools.cached_property
    def hints(self) -> dict[str, Any]:
        described = self.signature or self.call
        described = described.__init__ if isinstance(described, type) else described
        return typing.get_type_hints(described, localns={"Report": Any})


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


# The operators


def attention(query, key, value, causal, mask, key_padding, scale, softcap, window, dropout_p, return_lse):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else float(scale))
    scores = scores if softcap is None else float(softcap) * torch.tanh(scores / float(softcap))
    query_len, key_len = scores.shape[2:]
    distance = torch.arange(key_len) - torch.arange(query_len)[:, None] - (key_len - query_len)
    allowed = torch.ones(query_len, key_len, dtype=torch.bool)
    if causal:
        allowed = allowed & (distance <= 0)
    if window is not None:
        left, right = window
        allowed = allowed & (distance >= -min(left, 2**62) if left is not None else True)
        allowed = allowed & (distance <= min(right, 2**62) if right is not None else True)
    allowed = allowed.expand(scores.shape)
    if key_padding is not None:
        allowed = allowed & key_padding[:, None, None]
    if mask is not None:
        allowed, scores = (allowed & mask, scores) if mask.dtype == torch.bool else (allowed, scores + mask)
    scores = scores.masked_fill(~allowed, -math.inf)
    weights = scores.softmax(-1).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0)
    # What is not attended to does not reach the result, whatever it is.
    products = weights[..., None] * value[:, :, None]
    out = products.masked_fill((weights == 0)[..., None], 0).sum(3)
    return (out, scores.logsumexp(-1)) if return_lse else out


def attention_varlen(
    query, key, value, cu_seqlens_q, cu_seqlens_k, causal, window, scale, softcap, dropout_p, return_lse
):
    outs, lses = [query[:0]], [query[:0, :, 0].t()]
    ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    for (q0, k0), (q1, k1) in itertools.pairwise(ends):
        part = (x[None].transpose(1, 2) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        out, lse = attention(*part, causal, None, None, scale, softcap, window, 0, True)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return (torch.cat(outs), torch.cat(lses, 1)) if return_lse else torch.cat(outs)


def scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    options = {"is_causal": bool(is_causal), "scale": None if scale is None else float(scale)}
    options["enable_gqa"] = bool(enable_gqa)
    if attn_mask is not None and attn_mask.dim() < 2:  # PyTorch broadcasts these on some of its paths only
        attn_mask = attn_mask.expand(query.shape[-2], key.shape[-2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)


def gelu_mlp(x, w1, b1, w2, b2, approximate, layout, recompute):
    w1, w2 = (w1, w2) if layout == "linear" else (w1.t(), w2.t())
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2)


def glu_mlp(x, w_gate, w_up, w_down, b_gate, b_up, b_down, activation, recompute):
    gate = F.linear(x, w_gate, b_gate)
    value = F.gelu(gate, approximate="tanh") if activation == "gelu_tanh" else getattr(F, activation)(gate)
    return F.linear(value * F.linear(x, w_up, b_up), w_down, b_down)


def layernorm_residual(x, residual, weight, bias, eps, dropout_p):
    summed = x if residual is None else residual + x
    return F.layer_norm(summed, summed.shape[-1:], weight, bias, float(eps)), summed


def rms_norm_residual(x, residual, weight, eps, unit_offset, dropout_p):
    summed = x if residual is None else residual + x
    factor = 1 + weight if unit_offset else weight
    return summed * torch.rsqrt(summed.square().mean(-1, keepdim=True) + float(eps)) * factor, summed


def rotary(query, key, cos, sin):
    cos, sin, half = cos[:, None], sin[:, None], cos.shape[-1] // 2

    def rotated(x):
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        pairs = torch.cat((first, second), -1) * cos + torch.cat((-second, first), -1) * sin
        return torch.cat((pairs, rest), -1)

    return rotated(query), rotated(key)


def linear(x, weight, bias, layout):
    return F.linear(x, weight if layout == "linear" else weight.t(), bias)


def linear_cross_entropy(
    x, weight, target, bias, ignore_index, reduction, label_smoothing, token_weight, logit_scale, softcap
):
    logits = F.linear(x, weight, bias).flatten(0, -2) * float(logit_scale)
    logits = logits if softcap is None else float(softcap) * torch.tanh(logits / float(softcap))
    options = {"ignore_index": int(ignore_index), "label_smoothing": float(label_smoothing)}
    losses = F.cross_entropy(logits, target.flatten(), **options, reduction="none").view(target.shape)
    weights = torch.ones_like(losses) if token_weight is None else token_weight
    losses, weights = losses * weights, weights * (target != int(ignore_index))
    if reduction == "none":
        return losses
    return losses.sum() / weights.sum() if reduction == "mean" else losses.sum()


def linear_log_prob(x, weight, target, bias, temperature, softcap, ignore_index):
    logits = F.linear(x, weight, bias)
    logits = logits if softcap is None else float(softcap) * torch.tanh(logits / float(softcap))
    log_p, ignored = torch.log_softmax(logits / float(temperature), -1), target == int(ignore_index)
    log_prob = log_p.gather(-1, target.masked_fill(ignored, 0)[..., None])[..., 0].masked_fill(ignored, 0)
    return log_prob, -(log_p.exp() * log_p.clamp(min=-1e300)).sum(-1).masked_fill(ignored, 0)


def contrastive_loss(queries, documents, temperature, negatives, labels):
    compared = documents if negatives is None else torch.cat([documents, negatives])
    similarity = F.normalize(queries, dim=-1) @ F.normalize(compared, dim=-1).t()
    return F.cross_entropy(similarity / float(temperature), torch.arange(len(queries)) if labels is None else labels)


def attention_arguments():
    return {
        "query": normal(2, 4, 3, 8),
        "key": normal(2, 2, 5, 8),
        "value": normal(2, 2, 5, 8),
        "mask": normal(2, 1, 3, 5),
        "key_padding": torch.arange(5) < torch.tensor([[5], [4]]),
    }


STARTS, KEY_STARTS = torch.tensor([0, 2, 6]), torch.tensor([0, 3, 7])
OPERATORS = [
    Function("attention", fastlm.attention, attention_arguments, attention),
    Function(
        "attention_varlen",
        fastlm.attention_varlen,
        lambda: {
            "query": normal(6, 4, 8),
            "key": normal(7, 2, 8),
            "value": normal(7, 2, 8),
            "cu_seqlens_q": STARTS.clone(),
            "cu_seqlens_k": KEY_STARTS.clone(),
        },
        attention_varlen,
    ),
    Function(
        "scaled_dot_product_attention",
        fastlm.scaled_dot_product_attention,
        lambda: {
            "query": normal(2, 4, 3, 8),
            "key": normal(2, 4, 5, 8),
            "value": normal(2, 4, 5, 8),
            "attn_mask": normal(3, 5),
        },
        scaled_dot_product_attention,
    ),
    Function(
        "gelu_mlp",
        fastlm.gelu_mlp,
        lambda: {"x": normal(3, 6), "w1": normal(8, 6), "b1": normal(8), "w2": normal(5, 8), "b2": normal(5)},
        gelu_mlp,
    ),
    Function(
        "glu_mlp",
        fastlm.glu_mlp,
        lambda: {
            "x": normal(3, 6),
            "w_gate": normal(8, 6),
            "w_up": normal(6, 8).t(),
            "w_down": normal(5, 8),
            "b_gate": normal(8),
            "b_up": normal(8) + 1,
            "b_down": normal(5),
        },
        glu_mlp,
    ),
    Function(
        "layernorm_residual",
        fastlm.layernorm_residual,
        lambda: {"x": normal(3, 6), "residual": normal(6, 3).t(), "weight": normal(6), "bias": normal(6)},
        layernorm_residual,
    ),
    Function(
        "rms_norm_residual",
        fastlm.rms_norm_residual,
        lambda: {"x": normal(3, 6), "residual": normal(6, 3).t(), "weight": normal(6)},
        rms_norm_residual,
    ),
    Function(
        "rotary",
        fastlm.rotary,
        lambda: {
            "query": normal(2, 4, 3, 8),
            "key": normal(2, 2, 3, 8),
            "cos": normal(1, 3, 6),
            "sin": normal(1, 6, 3).mT,
        },
        rotary,
        tables=("cos", "sin"),
    ),
    Function(
        "linear",
        fastlm.linear,
        lambda: {"x": normal(2, 3, 6), "weight": normal(8, 6), "bias": normal(8)},
        linear,
    ),
    Function(
        "linear_cross_entropy",
        fastlm.linear_cross_entropy,
        lambda: {
            "x": normal(2, 3, 6),
            "weight": normal(8, 6),
            "target": torch.tensor([[0, 7, -100], [3, 3, 1]]),
            "bias": normal(8),
            "token_weight": normal(2, 3).abs(),
        },
        linear_cross_entropy,
    ),
    Function(
        "linear_log_prob",
        fastlm.linear_log_prob,
        lambda: {
            "x": normal(2, 3, 6),
            "weight": normal(8, 6),
            "target": torch.tensor([[0, 7, -100], [3, 3, 1]]),
            "bias": normal(8),
        },
        linear_log_prob,
    ),
    Function(
        "contrastive_loss",
        fastlm.contrastive_loss,
        lambda: {
            "queries": normal(4, 6),
            "documents": normal(6, 4).t(),
            "negatives": normal(3, 6),
            "labels": torch.tensor([0, 6, -100, 3]),
        },
        contrastive_loss,
    ),
]


# The optimiser


def adamw(params, lr=1e-3, **options):
    optimizer = fastlm.optim.AdamW(params, lr, **options)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def adamw_arguments():
    return {"params": [torch.nn.Parameter(normal(3, 4))]}


def adamw_state(
    exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, master_param: Tensor, backend: str | None = None
) -> None:
    """A step with this state, as a user or a state dict may have set it."""
    parameter = torch.nn.Parameter(normal(3, 4).bfloat16())
    optimizer = fastlm.optim.AdamW([parameter], master_weights=True, backend=backend)
    parameter.grad = normal(3, 4).bfloat16()
    state = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "master_param": master_param}
    optimizer.state[parameter].update(state)
    optimizer.step()


def adamw_load(step: Tensor | float, exp_avg: Tensor, exp_avg_sq: Tensor, master_param: Tensor) -> None:
    """A step after loading a state dict with this state."""
    load_and_step(adamw_state_dict({"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "master_param": master_param}, step))


def load_and_step(state_dict: dict) -> None:
    parameter = torch.nn.Parameter(normal(3, 4).bfloat16())
    optimizer = fastlm.optim.AdamW([parameter], master_weights=True)
    optimizer.load_state_dict(state_dict)
    parameter.grad = normal(3, 4).bfloat16()
    optimizer.step()


def adamw_state_dict(tensors: dict[str, Any], step: Any) -> dict[str, Any]:
    groups = fastlm.optim.AdamW([torch.nn.Parameter(normal(3, 4))]).state_dict()["param_groups"]
    return {"state": {0: {**tensors, "step": step}}, "param_groups": groups}


def adamw_state_dict_argument():
    tensors = adamw_state_arguments()
    return {"state_dict": adamw_state_dict(tensors, tensors.pop("step"))}


def adamw_state_arguments():
    moments = {name: normal(3, 4).abs() for name in ("exp_avg", "exp_avg_sq", "master_param")}
    return {"step": torch.tensor(2.0)} | moments


# Models and what takes them


@functools.cache
def gpt2_config():
    sizes = {"vocab_size": 40, "n_positions": 12, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return models.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)


@functools.cache
def bert_config():
    sizes = {"vocab_size": 40, "max_position_embeddings": 12, "hidden_size": 8, "num_hidden_layers": 1}
    return models.BertConfig(**sizes, num_attention_heads=2, intermediate_size=16, num_labels=3)


@functools.cache
def modernbert_config():
    sizes = {"vocab_size": 40, "max_position_embeddings": 12, "hidden_size": 8, "num_hidden_layers": 2}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return models.ModernBertConfig(**sizes, **ids, num_attention_heads=2, intermediate_size=16, local_attention=4)


CONFIGS = {"GPT2": gpt2_config, "Bert": bert_config, "Encoder": modernbert_config}


@functools.cache
def model(name):
    config = next(made for prefix, made in CONFIGS.items() if name.startswith(prefix))()
    return getattr(models, name)(config).eval()


def forward(name: str, **labels: Any) -> Function:
    def arguments():
        ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        mask = torch.ones(2, 3, dtype=torch.int64)
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros(2, 3, dtype=torch.int64)}
        if name.startswith("Encoder"):
            given["token_type_ids"] = None  # ModernBERT has no token types
        return given | {"position_ids": torch.arange(3).expand(2, 3)} | labels

    method = getattr(models, name).forward
    return Function(f"{name}.forward", lambda **options: model(name)(**options), arguments, signature=method)


def config(config_class: Any) -> Function:
    def call(**settings):
        return config_class.from_dict(config_class(**sizes() | settings).to_dict())

    def sizes():
        base = next(made() for made in CONFIGS.values() if type(made()) is config_class)
        return {field.name: getattr(base, field.name) for field in dataclasses.fields(config_class)}

    return Function(config_class.__name__, call, sizes, signature=config_class.__init__)


@functools.cache
def transformers_model():
    import transformers

    sizes = {"vocab_size": 40, "n_positions": 12, "n_embd": 8, "n_layer": 1, "n_head": 2}
    made = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    return transformers.GPT2LMHeadModel(made)


@functools.cache
def classifier():
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 1}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, intermediate_size=8))


@functools.cache
def words():
    import tokenizers
    import transformers

    vocabulary = tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(vocabulary))


@functools.cache
def saved_model() -> Path:
    directory = Path(tempfile.mkdtemp())
    model("GPT2LMHeadModel").save_pretrained(directory)
    return directory


class Tokenizer:
    mask_token, mask_token_id = None, None

    def encode(self, text: str) -> list[int]:
        return [len(word) % 40 for word in text.split()]

    def token(self, token: int) -> str:
        return str(token)


def use_backend(name):
    with fastlm.use_backend(name):
        fastlm.linear(normal(2, 3), normal(2, 3))


IDS, LABELS = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 2, -100], [4, 5, 6]])
OTHERS = [
    Function(
        "AdamW", adamw, lambda: {"params": [torch.nn.Parameter(normal(3, 4))]}, signature=fastlm.optim.AdamW.__init__
    ),
    Function("AdamW.state", adamw_state, adamw_state_arguments),
    Function("AdamW.load_state_dict", load_and_step, adamw_state_dict_argument),
    Function("AdamW.load_state_dict of a state", adamw_load, adamw_state_arguments),
    Function("accelerate", fastlm.accelerate, lambda: {"model": transformers_model()}),
    Function("report", fastlm.report, lambda: {"model": transformers_model()}),
    Function("restore", fastlm.restore, lambda: {"model": transformers_model()}),
    Function(
        "encode", fastlm.encode, lambda: {"model": transformers_model(), "texts": ["a", "b a"], "tokenizer": words()}
    ),
    Function(
        "rerank",
        fastlm.rerank,
        lambda: {"model": classifier(), "query": "a", "texts": ["a", "b a"], "tokenizer": words()},
    ),
    Function(
        "use_backend", use_backend, lambda: {"name": None}, signature=fastlm.use_backend, names={"name": "backend"}
    ),
    Function("warmup", fastlm.warmup, lambda: {"model": model("GPT2LMHeadModel"), "shapes": [(1, 3)]}),
    Function("load_model", models.load_model, lambda: {"directory": saved_model()}),
    Function("Sampling", Sampling, dict, signature=Sampling.__init__),
    Function(
        "generate",
        lambda **options: model("GPT2LMHeadModel").generate(**options),
        lambda: {"input_ids": IDS.clone(), "attention_mask": torch.ones(2, 3, dtype=torch.int64), "max_new_tokens": 2},
        signature=models.GPT2LMHeadModel.generate,
    ),
    Function(
        "predict",
        predict,
        lambda: {"model": model("GPT2LMHeadModel"), "tokenizer": Tokenizer(), "text": "a small example"},
    ),
    config(models.GPT2Config),
    config(models.BertConfig),
    config(models.ModernBertConfig),
    *(
        Function(name, getattr(models, name), lambda config=config: {"config": config()})
        for names, config in (
            (("GPT2Model", "GPT2LMHeadModel"), gpt2_config),
            (("BertModel", "BertForMaskedLM", "BertForSequenceClassification"), bert_config),
            (
                (
                    "EncoderModel",
                    "EncoderForMaskedLM",
                    "EncoderForSequenceClassification",
                    "EncoderForTokenClassification",
                ),
                modernbert_config,
            ),
        )
        for name in names
    ),
    forward("GPT2Model"),
    forward("GPT2LMHeadModel", labels=LABELS),
    forward("BertModel"),
    forward("BertForMaskedLM", labels=LABELS),
    forward("BertForSequenceClassification", labels=torch.tensor([0, 2])),
    forward("EncoderModel"),
    forward("EncoderForMaskedLM", labels=LABELS),
    forward("EncoderForSequenceClassification", labels=torch.tensor([0, 1])),
    forward("EncoderForTokenClassification", labels=torch.tensor([[0, 1, -100], [1, 1, 0]])),
]
FUNCTIONS = OPERATORS + OTHERS


def parameters_of(function: Function) -> dict[str, Any]:
    """The arguments of a function and their defaults."""
    found = inspect.signature(function.signature or function.call).parameters.values()
    return {p.name: p.default for p in found if p.name != "self" and p.kind is not p.VAR_KEYWORD}
