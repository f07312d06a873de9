"""The oracle: every operator in plain PyTorch, on every device and dtype, differentiable to any order in eager mode.

Each operator has its formula (what double backward differentiates), its forward and its backward. Arithmetic is never in 16 bits.
"""

import functools
import itertools
import math

import torch
from torch import Tensor

from fastlm.backends.philox import kept

OPERATORS = (
    "adamw",
    "attention",
    "attention_varlen",
    "layernorm_residual",
    "gelu_mlp",
    "linear",
    "linear_cross_entropy",
)


def refuses(operator, device, dtype, **features):
    reasons = []
    if operator not in OPERATORS:
        reasons.append(f"has no {operator}")
    if not dtype.is_floating_point:
        reasons.append(f"computes in floating point, not {dtype}")
    if features.get("amsgrad"):
        reasons.append("has no amsgrad")
    return reasons


def as_written(function):
    """Autocast would narrow the products in here again: the operator has cast its inputs, once, by its own rule."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        device = next(x for x in args if isinstance(x, Tensor)).device
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return call


def widen(*tensors):
    """Arithmetic is in float32, or float64 where the inputs are: never in a 16-bit type."""
    return tuple(t if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def narrow(dtype, *tensors):
    return tuple(t if t is None else t.to(dtype).contiguous() for t in tensors)


# adamw


def adamw(
    parameters,
    gradients,
    exp_avgs,
    exp_avg_sqs,
    masters,
    steps,
    *,
    max_exp_avg_sqs,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    factor,
    zero_gradients,
):
    for p, gradient, exp_avg, exp_avg_sq, master, step in zip(
        parameters, gradients, exp_avgs, exp_avg_sqs, masters or parameters, steps, strict=True
    ):
        t = step.add_(1).item()
        g, m, v, w, held = widen(gradient, exp_avg, exp_avg_sq, p, master)
        g = g * factor
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        w = torch.where(
            master.to(p.dtype) == p, held, w
        )  # a parameter that others have changed is the truth, not its master copy
        w = w * (1 - lr * weight_decay) - lr / (1 - beta1**t) * m / (v.sqrt() / math.sqrt(1 - beta2**t) + eps)
        for target, value in ((exp_avg, m), (exp_avg_sq, v), (p, w), (master, w)):
            target.copy_(value)
        if zero_gradients:
            gradient.zero_()


def sum_of_squares(tensors):
    return sum(widen(x)[0].square().sum(dtype=torch.float64) for x in tensors)


def differentiable_gradients(formula, inputs, needed, upstream):
    """Gradients of formula(*inputs) that are themselves part of the graph; None where `needed` says so, or where nothing depends on an input.

    The formula runs on aliases, not on the inputs: where one input was computed from another, the path between them
    belongs to the caller's graph and must not be counted here as well. A formula of several results takes as many upstreams.
    """
    with torch.enable_grad():
        aliases = [x if x is None else x.view_as(x) for x in inputs]
        wanted = [alias for alias, need in zip(aliases, needed, strict=True) if need]
        gradients = iter(torch.autograd.grad(formula(*aliases), wanted, upstream, create_graph=True, allow_unused=True))
    return [next(gradients) if need else None for need in needed]


# linear


def rows_by_columns(weight, layout):
    """The weight as (in, out), whichever way it is stored."""
    return weight.t() if layout == "linear" else weight


@as_written
def linear(x, weight, bias, layout):
    wide, w, b = widen(x, weight, bias)
    y = wide @ rows_by_columns(w, layout)
    return (y if b is None else y + b).to(x.dtype)


@as_written
def linear_forward(x, weight, bias, layout):
    return linear(x, weight, bias, layout).contiguous()


@as_written
def linear_backward(dy, x, weight, layout, needed):
    g, wide, w = widen(dy, x, weight)
    flat, gflat = wide.reshape(-1, x.shape[-1]), g.reshape(-1, dy.shape[-1])
    dx = g @ rows_by_columns(w, layout).t() if needed[0] else None
    dweight = (gflat.t() @ flat if layout == "linear" else flat.t() @ gflat) if needed[1] else None
    dbias = gflat.sum(0) if needed[2] else None
    return narrow(x.dtype, dx, dweight, dbias)


# gelu_mlp


def gelu_gradient(x, approximate):
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        t = torch.tanh(inner)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


@as_written
def gelu_mlp(x, w1, b1, w2, b2, approximate, layout):
    hidden = linear(*widen(x, w1, b1), layout)
    return linear(torch.nn.functional.gelu(hidden, approximate=approximate), *widen(w2, b2), layout).to(x.dtype)


@as_written
def gelu_mlp_forward(x, w1, b1, w2, b2, approximate, layout, recompute):
    hidden = linear(*widen(x, w1, b1), layout)
    activated = torch.nn.functional.gelu(hidden, approximate=approximate)
    y = linear(activated, *widen(w2, b2), layout)
    # What is saved is saved in x's dtype, as every backend does.
    y, hidden, activated = narrow(x.dtype, y, hidden, activated)
    return y, hidden if recompute < 2 else None, activated if recompute < 1 else None


@as_written
def gelu_mlp_backward(dy, x, w1, b1, w2, hidden, activated, approximate, layout, needed):
    g, wide, wide_w1, wide_b1, wide_w2 = widen(dy, x, w1, b1, w2)
    hidden = linear(wide, wide_w1, wide_b1, layout) if hidden is None else widen(hidden)[0]
    activated = torch.nn.functional.gelu(hidden, approximate=approximate) if activated is None else widen(activated)[0]
    _, _, _, needs_w2, needs_b2 = needed
    dactivated, dw2, db2 = linear_backward(g, activated, wide_w2, layout, (any(needed[:3]), needs_w2, needs_b2))
    dx = dw1 = db1 = None
    if any(needed[:3]):
        dx, dw1, db1 = linear_backward(
            dactivated * gelu_gradient(hidden, approximate), wide, wide_w1, layout, needed[:3]
        )
    return narrow(x.dtype, dx, dw1, db1, dw2, db2)


# layernorm_residual


def dropped(x, seed, p):
    """x after dropout over its flattened rows, scaled by 1 / (1 − p); x itself where there is no dropout."""
    if seed is None:
        return x
    keep = kept(seed, x.numel() // x.shape[-1], x.shape[-1], torch.zeros((), dtype=torch.int64, device=x.device), p)
    return torch.where(keep.view(x.shape), x * (1 / (1 - p)), 0)


def layer_norm(summed, weight, bias, eps, dtype):
    wide, w, b = widen(summed, weight, bias)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * w
    return (y if b is None else y + b).to(dtype)


@as_written
def layernorm_residual_forward(x, residual, weight, bias, seed, eps, dropout_p):
    if residual is None and seed is None:
        summed = x
    else:
        (wide,) = widen(dropped(widen(x)[0], seed, dropout_p))
        summed = (
            (wide if residual is None else widen(residual)[0] + wide)
            .to((x if residual is None else residual).dtype)
            .contiguous()
        )
    (wide,) = widen(summed)  # LN reads the sum as it is stored
    y = layer_norm(summed, weight, bias, eps, x.dtype).contiguous()
    mean = wide.mean(-1)
    rstd = torch.rsqrt((wide - mean[..., None]).square().mean(-1) + eps)
    return y, None if summed is x else summed, mean, rstd


@as_written
def layernorm_residual_backward(dy, dsummed, summed, weight, mean, rstd, seed, dropout_p, dtype, needed):
    g, wide, w, ds = widen(dy, summed, weight, dsummed)
    dweight = dbias = None
    if g is None:
        dweight, dbias = (w.new_zeros(w.shape) if need else None for need in needed[2:])
    else:
        xhat = (wide - mean[..., None]) * rstd[..., None]
        gw = g * w
        dnorm = rstd[..., None] * (gw - gw.mean(-1, keepdim=True) - xhat * (gw * xhat).mean(-1, keepdim=True))
        ds = dnorm if ds is None else ds + dnorm
        dweight = (g * xhat).reshape(-1, w.shape[0]).sum(0) if needed[2] else None
        dbias = g.reshape(-1, w.shape[0]).sum(0) if needed[3] else None
    (dx,) = narrow(dtype, dropped(ds, seed, dropout_p) if needed[0] else None)
    (dresidual,) = narrow(summed.dtype, ds if needed[1] else None)
    return dx, dresidual, *narrow(weight.dtype, dweight, dbias)


# linear_cross_entropy


def check_targets(target, vocab, ignore_index):
    """On a CPU the values are looked at; on a GPU, where that would synchronise, indexing with them is a device assert."""
    if target.device.type != "cpu":
        return
    wrong = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if wrong.any():
        raise out_of_range(target, tuple(wrong.nonzero()[0].tolist()), vocab, ignore_index)


def out_of_range(target, position, vocab, ignore_index):
    return ValueError(
        f"target: expected values in [0, {vocab}), the vocabulary, or ignore_index {ignore_index}, got {target[position]} at {list(position)}"
    )


@as_written
def row_losses(x, weight, bias, target, ignore_index, label_smoothing):
    """−log p(target) of every row, 0 where the target is ignored; float32, or float64 for float64 inputs."""
    logits = linear(*widen(x, weight, bias), "linear")
    log_p = torch.log_softmax(logits, -1)
    ignored = target == ignore_index
    picked = log_p.gather(-1, torch.where(ignored, 0, target)[..., None])[..., 0]
    return torch.where(ignored, 0, -(1 - label_smoothing) * picked - label_smoothing * log_p.mean(-1))


@as_written
def linear_cross_entropy_forward(x, weight, bias, target, row_scale, ignore_index, label_smoothing, needed):
    vocab = weight.shape[0]
    check_targets(target, vocab, ignore_index)
    loss = row_losses(x, weight, bias, target, ignore_index, label_smoothing).contiguous()
    if not any(needed):
        return loss, None, None, None
    wide, w, b = widen(x, weight, bias)
    dlogits = torch.softmax(linear(wide, w, b, "linear"), -1) - label_smoothing / vocab
    ignored = (target == ignore_index)[..., None]
    dlogits.scatter_add_(
        -1, torch.where(ignored, 0, target[..., None]), dlogits.new_full((*target.shape, 1), label_smoothing - 1)
    )
    dlogits = torch.where(ignored, 0, dlogits * row_scale[..., None])
    return loss, *narrow(x.dtype, *linear_backward(dlogits, wide, w, "linear", needed))


# attention


def allowed_places(query, key, mask, key_padding, lower, upper):
    """Where the bool mask, the padding and the band let a query look, broadcastable to (B, H, Tq, Tk); None = everywhere."""
    allowed = None if mask is None or mask.dtype != torch.bool else mask
    if key_padding is not None:
        padding = key_padding[:, None, None, :]
        allowed = padding if allowed is None else allowed & padding
    band = band_mask(query, key, lower, upper)
    return band if allowed is None else allowed if band is None else allowed & band


def band_mask(query, key, lower, upper):
    """lower ≤ j − i ≤ upper as a bool (Tq, Tk); None where that is everywhere."""
    query_len, key_len = query.shape[2], key.shape[2]
    if lower <= 1 - query_len and upper >= key_len - 1:
        return None
    distance = torch.arange(key_len, device=query.device) - torch.arange(query_len, device=query.device)[:, None]
    return (distance >= lower) & (distance <= upper)


def isolated(weights, values, reachable):
    """weights @ values, where a non-finite value reaches only the rows that `reachable` (None = all) lets see it: 0 · NaN is not 0."""
    finite = values.isfinite()
    if reachable is None or (not captured(values) and finite.all()):
        return weights @ values
    reachable = reachable.expand(weights.shape).to(weights.dtype)
    product = weights @ torch.where(finite, values, 0)
    for harm, found in (
        (torch.inf, values == torch.inf),
        (-torch.inf, values == -torch.inf),
        (torch.nan, values.isnan()),
    ):
        product = torch.where(reachable @ found.to(weights.dtype) > 0, product + harm, product)
    return product


def captured(x):
    """Whether what is launched on x goes into a CUDA graph: then no value can be looked at."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def grouped(x, groups):
    """Each key/value head once for every query head that shares it."""
    return x.repeat_interleave(groups, 1) if groups > 1 else x


def scores_of(query, key, mask, allowed, scale):
    scores = query @ key.mT * scale
    if mask is not None and mask.dtype != torch.bool:
        # An additive −inf masks whatever stands there: NaN + −inf would not be −inf.
        scores = torch.where(mask == -torch.inf, -torch.inf, scores + mask)
    return scores if allowed is None else torch.where(allowed, scores, -torch.inf)


def reach(query, key, mask, allowed):
    """allowed, and where an additive mask is not −inf: what `isolated` needs."""
    if mask is not None and mask.dtype != torch.bool:
        unmasked = mask != -torch.inf
        allowed = unmasked if allowed is None else allowed & unmasked
    return None if allowed is None else allowed.expand(*query.shape[:3], key.shape[2])


def softmax(scores):
    """(weights, log-sum-exp) over the last dimension; a row of −inf, or of no keys at all, has weights 0 and −inf."""
    top = torch.cat([scores.detach(), scores.new_full((*scores.shape[:3], 1), -torch.inf)], -1).amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    lse = torch.where(empty, -torch.inf, top + torch.log(torch.where(empty, 1, total)))
    return weights / torch.where(empty, 1, total), lse[..., 0]


@as_written
def attention(query, key, value, mask, key_padding, seed, scale, lower, upper, dropout_p, first=0):
    """(output, log-sum-exp), both wide; `first` is the number by which dropout knows the first of the batch."""
    q, k, v = widen(query, key, value)
    groups = query.shape[1] // key.shape[1]
    k, v = grouped(k, groups), grouped(v, groups)
    wide_mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    allowed = allowed_places(query, key, mask, key_padding, lower, upper)
    weights, lse = softmax(scores_of(q, k, wide_mask, allowed, scale))
    if seed is not None:
        weights = torch.where(attention_kept(seed, weights, dropout_p, first), weights * (1 / (1 - dropout_p)), 0)
    return isolated(weights, v, reach(q, k, wide_mask, allowed)), lse


def attention_kept(seed, weights, p, first):
    batch, heads, query_len, key_len = weights.shape
    return kept(
        seed,
        query_len,
        key_len,
        torch.arange(first * heads, (first + batch) * heads, device=weights.device).view(batch, heads),
        p,
    )


def tokens_first(x, dtype):
    """(B, H, T, D) laid out in memory as (B, T, H, D): merging the heads of a result is then a view."""
    return x.transpose(1, 2).to(dtype).contiguous().transpose(1, 2)


@as_written
def attention_forward(query, key, value, mask, key_padding, seed, scale, lower, upper, dropout_p, first=0):
    out, lse = attention(query, key, value, mask, key_padding, seed, scale, lower, upper, dropout_p, first)
    return tokens_first(out, query.dtype), lse.contiguous()


@as_written
def attention_backward(
    dout, dlse, query, key, value, mask, key_padding, seed, out, lse, scale, lower, upper, dropout_p, needed, first=0
):
    q, k, v, g = widen(query, key, value, dout)
    groups = query.shape[1] // key.shape[1]
    k, v = grouped(k, groups), grouped(v, groups)
    wide_mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    allowed = allowed_places(query, key, mask, key_padding, lower, upper)
    reachable = reach(q, k, wide_mask, allowed)
    weights, _ = softmax(
        scores_of(q, k, wide_mask, allowed, scale)
    )  # anew: exp(score − lse) rounds with the size of the scores
    g = torch.zeros_like(q) if g is None else g
    dweights = g @ v.mT
    if reachable is not None:  # a NaN behind the mask has come this far, in both
        weights, dweights = torch.where(reachable, weights, 0), torch.where(reachable, dweights, 0)
    sent = weights
    if seed is not None:
        keep = attention_kept(seed, weights, dropout_p, first)
        dweights = torch.where(keep, dweights * (1 / (1 - dropout_p)), 0)
        sent = torch.where(keep, weights * (1 / (1 - dropout_p)), 0)
    delta = (weights * dweights).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta if dlse is None else dweights - delta + dlse[..., None])
    across = None if reachable is None else reachable.mT
    dquery = isolated(dscores, k, reachable) * scale if needed[0] else None
    dkey = isolated(dscores.mT, q, across) * scale if needed[1] else None
    dvalue = isolated(sent.mT, g, across) if needed[2] else None
    if groups > 1:
        dkey, dvalue = (d if d is None else d.unflatten(1, (-1, groups)).sum(2) for d in (dkey, dvalue))
    dquery, dkey, dvalue = (d if d is None else tokens_first(d, query.dtype) for d in (dquery, dkey, dvalue))
    dmask = None
    if needed[3]:
        dmask = (
            shift_gradient(mask, lse, dlse)
            if mask.shape[3] == 1
            else dscores.sum_to_size(mask.shape).to(mask.dtype).contiguous()
        )
    return dquery, dkey, dvalue, dmask


def shift_gradient(mask, lse, dlse):
    """Of a mask with one entry for all keys. It moves a whole row of scores, which the weights do not notice and the log-sum-exp follows: summing the scores'
    gradients would give nothing but their rounding.
    """
    if dlse is None:
        return torch.zeros_like(mask, memory_format=torch.contiguous_format)
    return torch.where(lse == -torch.inf, 0, dlse)[..., None].sum_to_size(mask.shape).to(mask.dtype).contiguous()


# attention_varlen: each sequence as a batch of one


def starts_of(argument, cu_seqlens, total):
    """Where the sequences start, and the end of the last, as integers. On a GPU this waits for it."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0:
        raise ValueError(f"{argument}: expected 0 as its first value, got {starts[0]}")
    for i, (start, end) in enumerate(itertools.pairwise(starts)):
        if end < start:
            raise ValueError(f"{argument}: expected values that never decrease, got {end} at [{i + 1}], after {start}")
    if starts[-1] != total:
        raise ValueError(f"{argument}: expected {total}, the number of tokens, as its last value, got {starts[-1]}")
    return starts


def each_sequence(query, key, cu_seqlens_q, cu_seqlens_k):
    """(number, its queries, its keys, what the band moves by) for each: the last query stands at the last key."""
    starts_q = starts_of("cu_seqlens_q", cu_seqlens_q, query.shape[0])
    starts_k = starts_of("cu_seqlens_k", cu_seqlens_k, key.shape[0])
    for number, ((q0, q1), (k0, k1)) in enumerate(
        zip(itertools.pairwise(starts_q), itertools.pairwise(starts_k), strict=True)
    ):
        yield number, slice(q0, q1), slice(k0, k1), (k1 - k0) - (q1 - q0)


def batch_of_one(x, tokens):
    """Some tokens of (T, H, D) as (1, H, T, D)."""
    return x[tokens].transpose(0, 1)[None]


@as_written
def attention_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, seed, scale, lower, upper, dropout_p):
    """(output, log-sum-exp), both wide."""
    wide = torch.promote_types(query.dtype, torch.float32)
    outs, lses = [query.new_empty(0, *query.shape[1:], dtype=wide)], [query.new_empty(query.shape[1], 0, dtype=wide)]
    for number, queries, keys, moved in each_sequence(query, key, cu_seqlens_q, cu_seqlens_k):
        one = batch_of_one(query, queries), batch_of_one(key, keys), batch_of_one(value, keys)
        out, lse = attention(*one, None, None, seed, scale, lower + moved, upper + moved, dropout_p, number)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


@as_written
def attention_varlen_forward(query, key, value, cu_seqlens_q, cu_seqlens_k, seed, scale, lower, upper, dropout_p):
    def attend(number, q, k, v, moved):
        return attention_forward(q, k, v, None, None, seed, scale, lower + moved, upper + moved, dropout_p, number)

    return gather_forward(attend, query, key, value, cu_seqlens_q, cu_seqlens_k)


@as_written
def attention_varlen_backward(
    dout, dlse, query, key, value, cu_seqlens_q, cu_seqlens_k, seed, out, lse, scale, lower, upper, dropout_p, needed
):
    def differentiate(number, dout, dlse, q, k, v, out, lse, moved):
        masks = None, None
        return attention_backward(
            dout,
            dlse,
            q,
            k,
            v,
            *masks,
            seed,
            out,
            lse,
            scale,
            lower + moved,
            upper + moved,
            dropout_p,
            (*needed, False),
            number,
        )

    return gather_backward(differentiate, dout, dlse, query, key, value, cu_seqlens_q, cu_seqlens_k, out, lse, needed)


def gather_forward(attend, query, key, value, cu_seqlens_q, cu_seqlens_k):
    """What attend(number, query, key, value, moved) makes of each sequence, packed."""
    out, lse = (
        query.new_empty(query.shape),
        query.new_empty(query.shape[1], query.shape[0], dtype=torch.promote_types(query.dtype, torch.float32)),
    )
    for number, queries, keys, moved in each_sequence(query, key, cu_seqlens_q, cu_seqlens_k):
        one, one_lse = attend(
            number, batch_of_one(query, queries), batch_of_one(key, keys), batch_of_one(value, keys), moved
        )
        out[queries], lse[:, queries] = one[0].transpose(0, 1), one_lse[0]
    return out, lse


def gather_backward(differentiate, dout, dlse, query, key, value, cu_seqlens_q, cu_seqlens_k, out, lse, needed):
    """The gradients that differentiate(number, dout, dlse, query, key, value, out, lse, moved) makes of each sequence, packed."""
    dout = torch.zeros_like(out) if dout is None else dout
    gradients = [x.new_empty(x.shape) if need else None for x, need in zip((query, key, value), needed, strict=True)]
    for number, queries, keys, moved in each_sequence(query, key, cu_seqlens_q, cu_seqlens_k):
        q, g, o = (batch_of_one(x, queries) for x in (query, dout, out))
        k, v = batch_of_one(key, keys), batch_of_one(value, keys)
        parts = differentiate(
            number, g, None if dlse is None else dlse[None, :, queries], q, k, v, o, lse[None, :, queries], moved
        )
        for gradient, part, tokens in zip(gradients, parts[:3], (queries, keys, keys), strict=True):
            if gradient is not None:
                gradient[tokens] = part[0].transpose(0, 1)
    return tuple(gradients)
