"""A random right call of each operator, and the same by PyTorch."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import fastlm
from tests.fuzz.draw import LAYOUTS, Draw, integers, large, normal, outlier, strided, tiny, wide, zeros

# The largest |score| of attention. float32 rounds larger ones by more than 2⁻⁴: their weights are rounding errors.
LARGEST_SCORE = 1e6
# The largest |x| of layernorm_residual: float32 squares overflow at 1.8e19.
LARGEST_SUMMAND = 1e15


@dataclasses.dataclass
class Problem:
    ours: Callable[..., Any]  # (*inputs, backend=) → results
    torch_own: Callable[..., Any]
    inputs: list[Tensor | None]
    shuffle: Callable[[], list[Tensor | None]]  # the same numbers in another order
    # By how many halves of the distance of subnormal numbers a result may be off: one for each time it is rounded. The
    # gradients of a loss are rounded before and after the factor of the upstream gradient, here at most 3 or so.
    underflow: int = 1
    # The size of the terms of a result that may cancel almost to nothing, by the number of the result.
    terms: dict[int, float] = dataclasses.field(default_factory=dict)


def linear(draw: Draw) -> Problem:
    rows, width, out = (draw.size(n, s) for n, s in ((70, "rows"), (200, "width"), (100, "out")))
    layout = draw.one_of(("linear", "conv1d"), "layout")
    x = draw.tensor(rows, width, label="x")
    weight = draw.tensor(*((out, width) if layout == "linear" else (width, out)), label="weight")
    bias = draw.maybe(out, label="bias")

    def shuffle():
        order = draw.permutation(width)
        return [x[draw.permutation(rows)][:, order], weight[:, order] if layout == "linear" else weight[order], bias]

    return Problem(
        lambda *t, backend: fastlm.linear(*t, layout=layout, backend=backend),
        lambda x, w, b: F.linear(x, w if layout == "linear" else w.t(), b),
        [x, weight, bias],
        shuffle,
    )


def gelu_mlp(draw: Draw) -> Problem:
    rows, width, hidden, out = (draw.size(n, s) for n, s in ((40, "rows"), (70, "width"), (90, "hidden"), (70, "out")))
    layout, approximate = draw.one_of(("linear", "conv1d"), "layout"), draw.one_of(("none", "tanh"), "approximate")
    recompute = draw.one_of((0, 1, 2), "recompute")

    def as_stored(weight):
        return weight if layout == "linear" else weight.t()

    x = draw.tensor(rows, width, label="x")
    w1, b1 = draw.tensor(hidden, width, label="w1"), draw.maybe(hidden, label="b1")
    w2, b2 = draw.tensor(out, hidden, label="w2"), draw.maybe(out, label="b2")

    def shuffle():
        order, inner = draw.permutation(width), draw.permutation(hidden)
        permuted = w1[inner][:, order], None if b1 is None else b1[inner], w2[:, inner]
        return [x[draw.permutation(rows)][:, order], as_stored(permuted[0]), permuted[1], as_stored(permuted[2]), b2]

    def torch_own(x, w1, b1, w2, b2):
        return F.linear(F.gelu(F.linear(x, as_stored(w1), b1), approximate=approximate), as_stored(w2), b2)

    options = {"layout": layout, "approximate": approximate, "recompute": recompute}
    return Problem(
        lambda *t, backend: fastlm.gelu_mlp(*t, **options, backend=backend),
        torch_own,
        [x, as_stored(w1), b1, as_stored(w2), b2],
        shuffle,
    )


def glu_mlp(draw: Draw) -> Problem:
    rows, width, hidden, out = (draw.size(n, s) for n, s in ((40, "rows"), (70, "width"), (90, "hidden"), (70, "out")))
    recompute = draw.one_of((0, 1, 2), "recompute")
    activation = draw.one_of(("silu", "gelu", "gelu_tanh", "relu"), "activation")

    x, w_down = draw.tensor(rows, width, label="x"), draw.tensor(out, hidden, label="w_down")
    w_gate, w_up = (draw.tensor(hidden, width, label=label) for label in ("w_gate", "w_up"))
    b_gate, b_up = (draw.maybe(hidden, label=label) for label in ("b_gate", "b_up"))
    b_down = draw.maybe(out, label="b_down")

    def shuffle():
        order, inner = draw.permutation(width), draw.permutation(hidden)
        weights = w_gate[inner][:, order], w_up[inner][:, order], w_down[:, inner]
        biases = (None if b is None else b[inner] for b in (b_gate, b_up))
        return [x[draw.permutation(rows)][:, order], *weights, *biases, b_down]

    def torch_own(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
        gate = F.linear(x, w_gate, b_gate)
        value = F.gelu(gate, approximate="tanh") if activation == "gelu_tanh" else getattr(F, activation)(gate)
        return F.linear(value * F.linear(x, w_up, b_up), w_down, b_down)

    return Problem(
        lambda *t, backend: fastlm.glu_mlp(*t, activation=activation, recompute=recompute, backend=backend),
        torch_own,
        [x, w_gate, w_up, w_down, b_gate, b_up, b_down],
        shuffle,
    )


def layernorm_residual(draw: Draw) -> Problem:
    # Not rows of equal numbers: normalised they are the rounding error of their mean, times 1/√eps.
    values = normal, wide, outlier, tiny, large, zeros
    rows, width = draw.size(60, "rows"), draw.size(300, "width", 3)
    eps = draw.one_of((1e-5, 1e-12, 1e-3), "eps")
    factor = draw.one_of((1.0, 1.0, LARGEST_SUMMAND), "factor") if draw.dtype != torch.float16 else 1.0
    x, residual = draw.tensor(rows, width, label="x", values=values), None
    if draw.one_of((False, True), "residual"):
        residual = draw.tensor(rows, width, label="residual", values=values)
    x = (x.float() * factor / max(1.0, x.float().abs().max().item() if factor > 1 else 1.0)).to(x.dtype)
    weight, bias = draw.tensor(width, label="weight"), draw.maybe(width, label="bias")

    def shuffle():
        order = draw.permutation(width)
        return [x if x is None else x[..., order] for x in (x_of[0], x_of[1], weight, bias)]

    x_of = x, residual

    def torch_own(x, residual, weight, bias):
        summed = x if residual is None else residual + x
        return F.layer_norm(summed, (width,), weight, bias, eps)

    def ours(x, residual, weight, bias, backend):
        return fastlm.layernorm_residual(x, residual, weight, bias, eps, backend=backend)[0]

    return Problem(ours, torch_own, [x, residual, weight, bias], shuffle)


def rms_norm_residual(draw: Draw) -> Problem:
    # Not one or two columns: the gradient of x is then the rounding error of a difference.
    rows, width = draw.size(60, "rows"), draw.size(300, "width", 3)
    eps, unit_offset = draw.one_of((1e-6, 1e-12, 1e-3), "eps"), draw.one_of((False, True), "unit_offset")
    with_residual = draw.one_of((False, True), "residual")
    values = (normal, outlier, tiny, large, zeros)
    if not with_residual or draw.dtype != torch.float16:  # whose sum would overflow
        values += (wide,)
    x, residual = draw.tensor(rows, width, label="x", values=values), None
    if with_residual:
        residual = draw.tensor(rows, width, label="residual", values=values)
    weight = draw.tensor(width, label="weight")

    def shuffle():
        order = draw.permutation(width)
        return [t if t is None else t[..., order] for t in (x, residual, weight)]

    def torch_own(x, residual, weight):
        summed = x if residual is None else residual + x
        wide = summed.to(torch.promote_types(summed.dtype, torch.float32))
        normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        if unit_offset:
            return (normalized * (1 + weight.to(wide.dtype))).to(summed.dtype)
        return weight * normalized.to(summed.dtype)

    def ours(x, residual, weight, backend):
        return fastlm.rms_norm_residual(x, residual, weight, eps, unit_offset=unit_offset, backend=backend)[0]

    return Problem(ours, torch_own, [x, residual, weight], shuffle)


def linear_cross_entropy(draw: Draw) -> Problem:
    rows, width, vocab = (draw.size(n, s) for n, s in ((40, "rows"), (70, "width"), (150, "vocab")))
    x = draw.tensor(rows, width, label="x") / width**0.5
    weight, bias = draw.tensor(vocab, width, label="weight"), draw.maybe(vocab, label="bias")
    ignore_index = draw.one_of((-100, 0, vocab - 1), "ignore_index")
    options = {
        "ignore_index": ignore_index,
        "reduction": draw.one_of(("mean", "sum", "none"), "reduction"),
        "label_smoothing": draw.one_of((0.0, 0.1, 1.0), "label_smoothing"),
    }
    target = torch.randint(vocab, (rows,), generator=draw.generator)
    target[torch.rand(rows, generator=draw.generator) < 0.2] = ignore_index
    target[0] = (ignore_index + 1) % vocab if vocab > 1 else 0  # a mean over no rows is NaN
    if vocab == 1 and ignore_index == 0:
        options["reduction"] = "sum"

    def torch_own(x, weight, bias):
        logits = F.linear(x, weight, bias)
        wide = torch.promote_types(logits.dtype, torch.float32)  # as in models; the loss is in float32
        return F.cross_entropy(logits.to(wide), target, **options)

    def shuffle():
        order, words = draw.permutation(width), draw.permutation(vocab)
        return [x[draw.permutation(rows)][:, order], weight[words][:, order], None if bias is None else bias[words]]

    return Problem(
        lambda x, w, b, backend: fastlm.linear_cross_entropy(x, w, target, b, **options, backend=backend),
        torch_own,
        [x, weight, bias],
        shuffle,
        underflow=4,
    )


def linear_log_prob(draw: Draw) -> Problem:
    rows, width, vocab = (draw.size(n, s) for n, s in ((40, "rows"), (70, "width"), (150, "vocab")))
    x = draw.tensor(rows, width, label="x") / width**0.5
    weight, bias = draw.tensor(vocab, width, label="weight"), draw.maybe(vocab, label="bias")
    temperature, softcap = draw.one_of((1.0, 0.3, 5.0), "temperature"), draw.one_of((None, 2.0), "softcap")
    target = torch.randint(vocab, (rows,), generator=draw.generator)

    def torch_own(x, weight, bias):
        logits = F.linear(x, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        log_p = torch.log_softmax(logits / temperature, -1)
        return log_p.gather(-1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    def shuffle():
        order, words = draw.permutation(width), draw.permutation(vocab)
        return [x[:, order], weight[words][:, order], None if bias is None else bias[words]]

    options = {"temperature": temperature, "softcap": softcap}
    return Problem(
        lambda x, w, b, backend: fastlm.linear_log_prob(x, w, target, b, **options, backend=backend),
        torch_own,
        [x, weight, bias],
        shuffle,
    )


def contrastive_loss(draw: Draw) -> Problem:
    batch, width, count = draw.size(40, "batch"), draw.size(70, "width"), draw.size(30, "negatives", smallest=0)
    queries, documents = (draw.tensor(batch, width, label=name) for name in ("queries", "documents"))
    negatives = draw.tensor(count, width, label="negatives") if count else None
    temperature = draw.one_of((0.05, 1.0, 10.0), "temperature")
    labels = torch.randint(batch + count, (batch,), generator=draw.generator)
    labels[1:][torch.rand(batch - 1, generator=draw.generator) < 0.2] = -100  # a mean over no rows is NaN

    embeddings = [x for x in (queries, documents, negatives) if x is not None]

    def torch_own(queries, documents, negatives):
        compared = documents if negatives is None else torch.cat([documents, negatives])
        similarity = F.normalize(queries, dim=-1) @ F.normalize(compared, dim=-1).t()
        wide = torch.promote_types(similarity.dtype, torch.float32)
        return F.cross_entropy(similarity.to(wide) / temperature, labels)

    def shuffle():
        columns = draw.permutation(width)
        return [x if x is None else x[:, columns] for x in (queries, documents, negatives)]

    return Problem(
        lambda q, d, n, backend: fastlm.contrastive_loss(
            q, d, negatives=n, temperature=temperature, labels=labels, backend=backend
        ),
        torch_own,
        [queries, documents, negatives],
        shuffle,
        # A norm below 1e-12 counts as that: the gradients of an embedding of zeros are sums that were divided by it.
        terms={i: 1e12 / temperature / batch for i, x in enumerate(embeddings, 1) if not x.any(1).all()},
    )


def attention(draw: Draw) -> Problem:
    batch, num_kv_heads, groups = draw.size(2, "batch"), draw.size(2, "num_kv_heads"), draw.size(2, "groups")
    query_len, key_len = draw.size(70, "query_len"), draw.size(90, "key_len")
    head_dim, heads = draw.size(70, "head_dim"), num_kv_heads * groups
    query = draw.tensor(batch, heads, query_len, head_dim, label="query")
    key = draw.tensor(batch, num_kv_heads, key_len, head_dim, label="key")
    value = draw.tensor(batch, num_kv_heads, key_len, head_dim, label="value")
    scale = draw.one_of((None, 1.0, 0.01, -0.3), "scale")
    wide_query, wide_key = query.double().repeat_interleave(1, 1), key.double().repeat_interleave(groups, 1)
    score = (wide_query @ wide_key.mT).abs().max().item() * abs(head_dim**-0.5 if scale is None else scale)
    if score > LARGEST_SCORE:
        query = (query.float() * (LARGEST_SCORE / score)).to(query.dtype)
    softcap = draw.one_of((None, None, 1.0, 50.0), "softcap")
    causal = draw.one_of((False, True), "causal")
    side = st.none() | st.integers(0, key_len)
    window = draw.data.draw(st.none() | st.tuples(side, side), label="window")
    padded = draw.one_of((False, True), "key_padding")
    key_padding = torch.rand(batch, key_len, generator=draw.generator) < 0.7 if padded else None
    masks = draw.one_of(("none", "none", "bool", "additive", "additive float32"), "mask")
    mask = None
    if masks != "none":
        sizes = zip((batch, heads, query_len, key_len), ("batch", "heads", "query_len", "key_len"), strict=True)
        shape = [draw.one_of((1, size), f"mask's {name}") for size, name in sizes]
        dropped = torch.rand(shape, generator=draw.generator) < 0.3
        mask = torch.randn(shape, generator=draw.generator).masked_fill(dropped, -math.inf)
        mask = ~dropped if masks == "bool" else mask.to(query.dtype if masks == "additive" else torch.float32)
    distance = torch.arange(key_len) - torch.arange(query_len)[:, None] - (key_len - query_len)
    left, right = window or (None, None)
    allowed = (distance <= (0 if causal else math.inf)) & (distance <= (math.inf if right is None else right))
    allowed = (allowed & (distance >= (-math.inf if left is None else -left))).expand(batch, heads, -1, -1)
    if key_padding is not None:
        allowed = allowed & key_padding[:, None, None]
    if mask is not None:
        allowed = allowed & (mask if mask.dtype == torch.bool else mask > -math.inf)
    attends = allowed.any(-1, keepdim=True)

    def torch_own(query, key, value):
        # PyTorch's result of a query without keys is undefined: such a query attends to all of them, and counts as 0.
        bias = torch.zeros((), dtype=query.dtype).masked_fill(~(allowed | ~attends), -math.inf)
        if mask is not None and mask.dtype != torch.bool:
            bias = bias + torch.where(mask == -math.inf, 0, mask).to(query.dtype)
        repeated = [x.repeat_interleave(groups, 1) for x in (key, value)]
        if softcap is not None:
            scores = query @ repeated[0].mT * (head_dim**-0.5 if scale is None else scale)
            weights = torch.softmax(softcap * torch.tanh(scores / softcap) + bias, -1)
            return torch.where(attends, weights @ repeated[1], 0)
        out = F.scaled_dot_product_attention(query, *repeated, attn_mask=bias, scale=scale)
        return torch.where(attends, out, 0)

    def shuffle():
        order, columns = draw.permutation(head_dim), draw.permutation(head_dim)
        queries, keys, values = (draw.permutation(size) for size in (query_len, key_len, key_len))
        return [query[:, :, queries][..., order], key[:, :, keys][..., order], value[:, :, values][..., columns]]

    options = {"causal": causal, "window": window, "scale": scale, "mask": mask, "key_padding": key_padding}
    options["softcap"] = softcap

    def ours(*t, backend):
        capped_by_another = softcap is not None and backend == "torch"  # which has no cap
        return fastlm.attention(*t, **options, backend=None if capped_by_another else backend)

    return Problem(
        ours,
        torch_own,
        [query, key, value],
        shuffle,
    )


def attention_varlen(draw: Draw) -> Problem:
    num_kv_heads, groups, head_dim = draw.size(2, "num_kv_heads"), draw.size(2, "groups"), draw.size(70, "head_dim")
    lengths = draw.data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 50)), min_size=1, max_size=4))
    starts = [torch.tensor([0, *(pair[side] for pair in lengths)]).cumsum(0) for side in (0, 1)]
    total_q, total_k = int(starts[0][-1]), int(starts[1][-1])
    query = draw.tensor(total_q, num_kv_heads * groups, head_dim, label="query", values=(normal, tiny, zeros, integers))
    key = draw.tensor(total_k, num_kv_heads, head_dim, label="key", values=(normal, outlier, tiny, zeros, integers))
    value = draw.tensor(total_k, num_kv_heads, head_dim, label="value")
    causal = draw.one_of((False, True), "causal")

    def torch_own(query, key, value):
        outs = [query[:0] + 0 * (key.sum() + value.sum())]
        for (q0, q1), (k0, k1) in zip(*(itertools.pairwise(s) for s in starts), strict=True):
            if q1 == q0 or k1 == k0:
                outs.append(0 * query[q0:q1])
                continue
            part = query[q0:q1], *(x[k0:k1].repeat_interleave(groups, 1) for x in (key, value))
            distance = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None] - ((k1 - k0) - (q1 - q0))
            allowed = (distance <= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
            attends = allowed.any(-1, keepdim=True)
            bias = torch.zeros((), dtype=query.dtype).masked_fill(~(allowed | ~attends), -math.inf)
            out = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), attn_mask=bias)
            outs.append(torch.where(attends, out, 0)[0].transpose(0, 1))
        return torch.cat(outs)

    def shuffle():
        order, columns = draw.permutation(head_dim), draw.permutation(head_dim)
        return [query[..., order], key[..., order], value[..., columns]]

    return Problem(
        lambda *t, backend: fastlm.attention_varlen(*t, *starts, causal=causal, backend=backend),
        torch_own,
        [query, key, value],
        shuffle,
    )


def rotary(draw: Draw) -> Problem:
    batch, tokens, num_kv_heads, groups = (draw.size(3, s) for s in ("batch", "tokens", "num_kv_heads", "groups"))
    tokens, rotary_dim = tokens * draw.size(7, "tokens"), 2 * draw.size(20, "rotary_dim")
    head_dim = rotary_dim + draw.one_of((0, 0, 1, 6), "channels that are not rotated")
    query = draw.tensor(batch, num_kv_heads * groups, tokens, head_dim, label="query")
    key = draw.tensor(batch, num_kv_heads, tokens, head_dim, label="key")
    angles = 10 * torch.randn(draw.one_of((1, batch), "tables"), tokens, rotary_dim, generator=draw.generator)
    tables = [strided(table, draw.one_of(LAYOUTS, "layout of a table")) for table in (angles.cos(), angles.sin())]

    def torch_own(query, key):
        cos, sin = (table.to(query.dtype)[:, None] for table in tables)

        def rotated(x):
            first, second = x[..., :rotary_dim].chunk(2, -1)
            turned = x[..., :rotary_dim] * cos + torch.cat((-second, first), -1) * sin
            return torch.cat((turned, x[..., rotary_dim:]), -1)

        return rotated(query), rotated(key)

    def ours(query, key, backend):
        wide = [table.double() if query.dtype == torch.float64 else table for table in tables]
        return fastlm.rotary(query, key, *wide, backend=backend)

    def shuffle():  # there are no sums; the other rows of a batch have other tables
        heads = draw.permutation(num_kv_heads * groups)
        return [query[:, heads], key[:, draw.permutation(num_kv_heads)]]

    return Problem(ours, torch_own, [query, key], shuffle)


PROBLEMS = [
    attention,
    attention_varlen,
    contrastive_loss,
    gelu_mlp,
    glu_mlp,
    layernorm_residual,
    linear,
    linear_cross_entropy,
    linear_log_prob,
    rms_norm_residual,
    rotary,
]
