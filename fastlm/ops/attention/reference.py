"""attention in plain PyTorch: the definition."""

import torch
from torch import Tensor

from fastlm.backends import reference
from fastlm.backends.contract import Implementation
from fastlm.backends.reference import widen
from fastlm.core.autocast import no_autocast
from fastlm.core.philox import dropout_mask
from fastlm.ops.attention import packed
from fastlm.ops.attention.spec import Backward, Forward


def allowed_scores(query, key, mask, key_padding, lower, upper) -> Tensor | None:
    """Where the bool mask, the padding and the band allow, broadcastable to (B, H, Tq, Tk); None = everywhere."""
    allowed = None if mask is None or mask.dtype != torch.bool else mask
    if key_padding is not None:
        padding = key_padding[:, None, None, :]
        allowed = padding if allowed is None else allowed & padding
    band = band_mask(query, key, lower, upper)
    if band is None:
        return allowed
    return band if allowed is None else allowed & band


def band_mask(query: Tensor, key: Tensor, lower: int, upper: int) -> Tensor | None:
    """lower ≤ j − i ≤ upper as a bool (Tq, Tk); None where that is everywhere."""
    query_len, key_len = query.shape[2], key.shape[2]
    if lower <= 1 - query_len and upper >= key_len - 1:
        return None
    distance = torch.arange(key_len, device=query.device) - torch.arange(query_len, device=query.device)[:, None]
    return (distance >= lower) & (distance <= upper)


def masked_product(weights: Tensor, values: Tensor, reachable: Tensor | None) -> Tensor:
    """weights @ values, where a non-finite value affects only the rows that may read it: 0 · NaN is not 0.

    reachable says which rows may read which values; None = all.
    """
    finite = values.isfinite()
    if reachable is None or (not is_capturing(values) and finite.all()):
        return weights @ values
    reachable = reachable.expand(weights.shape).to(weights.dtype)
    product = weights @ torch.where(finite, values, 0)
    kinds = (torch.inf, values == torch.inf), (-torch.inf, values == -torch.inf), (torch.nan, values.isnan())
    for non_finite, where in kinds:
        product = torch.where(reachable @ where.to(weights.dtype) > 0, product + non_finite, product)
    return product


def is_capturing(x: Tensor) -> bool:
    """Whether launches on x are captured into a CUDA graph: then no value can be read."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def repeat_kv_heads(x: Tensor, groups: int) -> Tensor:
    """Each key or value head once for every query head that shares it."""
    return x.repeat_interleave(groups, 1) if groups > 1 else x


def capped_scores(query: Tensor, key: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """(scores, their derivative by the scaled products; None = 1)."""
    scores = query @ key.mT * scale
    if not softcap:
        return scores, None
    ratio = torch.tanh(scores / softcap)
    return softcap * ratio, 1 - ratio * ratio


def masked_scores(scores: Tensor, mask: Tensor | None, allowed: Tensor | None) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        # An additive −inf masks any score: NaN + −inf would not be −inf.
        scores = torch.where(mask == -torch.inf, -torch.inf, scores + mask)
    return scores if allowed is None else torch.where(allowed, scores, -torch.inf)


def reachable_values(query: Tensor, key: Tensor, mask: Tensor | None, allowed: Tensor | None) -> Tensor | None:
    """allowed, and where an additive mask is not −inf: what `masked_product` takes."""
    if mask is not None and mask.dtype != torch.bool:
        unmasked = mask != -torch.inf
        allowed = unmasked if allowed is None else allowed & unmasked
    return None if allowed is None else allowed.expand(*query.shape[:3], key.shape[2])


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, log-sum-exp) over the last dimension; a row of −inf, or of no keys, has weights 0 and −inf."""
    no_key = scores.new_full((*scores.shape[:3], 1), -torch.inf)
    row_max = torch.cat([scores.detach(), no_key], -1).amax(-1, keepdim=True)
    row_max = torch.where(row_max == -torch.inf, 0, row_max)
    weights = torch.exp(scores - row_max)
    row_sum = weights.sum(-1, keepdim=True)
    empty = row_sum == 0
    lse = torch.where(empty, -torch.inf, row_max + torch.log(torch.where(empty, 1, row_sum)))
    return weights / torch.where(empty, 1, row_sum), lse[..., 0]


@no_autocast
def attention(query, key, value, mask, key_padding, seed, scale, softcap, lower, upper, dropout_p, first=0):
    """(output, log-sum-exp) of a dense batch, both widened; `first` is the index of its first sequence for dropout."""
    q, k, v = widen(query, key, value)
    groups = query.shape[1] // key.shape[1]
    k, v = repeat_kv_heads(k, groups), repeat_kv_heads(v, groups)
    wide_mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    allowed = allowed_scores(query, key, mask, key_padding, lower, upper)
    scores, _ = capped_scores(q, k, scale, softcap)
    weights, lse = softmax(masked_scores(scores, wide_mask, allowed))
    if seed is not None:
        keep = kept_weights(seed, weights, dropout_p, first)
        weights = torch.where(keep, weights * (1 / (1 - dropout_p)), 0)
    return masked_product(weights, v, reachable_values(q, k, wide_mask, allowed)), lse


@no_autocast
def packed_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, seed, scale, softcap, lower, upper, dropout_p):
    """The same of a packed batch."""
    wide = torch.promote_types(query.dtype, torch.float32)
    outs = [query.new_empty(0, *query.shape[1:], dtype=wide)]
    lses = [query.new_empty(query.shape[1], 0, dtype=wide)]
    tensors = query, key, value, None, None, cu_seqlens_q, cu_seqlens_k, seed
    call = Forward(*tensors, scale, softcap, lower, upper, dropout_p, True, False)
    for index, queries, keys, offset in packed.sequences(call):
        one = packed.as_batch(query, queries), packed.as_batch(key, keys), packed.as_batch(value, keys)
        band = lower + offset, upper + offset
        out, lse = attention(*one, None, None, seed, scale, softcap, *band, dropout_p, index)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def kept_weights(seed: Tensor, weights: Tensor, p: float, first: int) -> Tensor:
    """The dropout mask of attention weights (B, H, Tq, Tk)."""
    batch, heads, query_len, key_len = weights.shape
    batch_head = torch.arange(first * heads, (first + batch) * heads, device=weights.device).view(batch, heads)
    return dropout_mask(seed, query_len, key_len, batch_head, p)


def tokens_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, T, D) stored as (B, T, H, D): merging the heads of a result is then a view."""
    return x.transpose(1, 2).to(dtype).contiguous().transpose(1, 2)


@no_autocast
def forward_dense(call: Forward, first: int = 0):
    masks = call.mask, call.key_padding, call.seed
    attributes = call.scale, call.softcap, call.lower, call.upper, call.dropout_p
    out, lse = attention(call.query, call.key, call.value, *masks, *attributes, first)
    return tokens_first(out, call.query.dtype), lse.contiguous()


@no_autocast
def backward_dense(call: Backward, first: int = 0):
    query, key, value, mask, scale = call.query, call.key, call.value, call.mask, call.scale
    needs_dquery, needs_dkey, needs_dvalue, needs_dmask = call.needed
    q, k, v, g = widen(query, key, value, call.dout)
    groups = query.shape[1] // key.shape[1]
    k, v = repeat_kv_heads(k, groups), repeat_kv_heads(v, groups)
    wide_mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    allowed = allowed_scores(query, key, mask, call.key_padding, call.lower, call.upper)
    reachable = reachable_values(q, k, wide_mask, allowed)
    # The softmax is recomputed from the scores: exp(score − lse) would round with the size of the scores.
    scores, slope = capped_scores(q, k, scale, call.softcap)
    weights, _ = softmax(masked_scores(scores, wide_mask, allowed))
    g = torch.zeros_like(q) if g is None else g
    dweights = g @ v.mT
    if reachable is not None:  # both may hold a NaN from a masked position
        weights, dweights = torch.where(reachable, weights, 0), torch.where(reachable, dweights, 0)
    dropped = weights
    if call.seed is not None:
        keep, factor = kept_weights(call.seed, weights, call.dropout_p, first), 1 / (1 - call.dropout_p)
        dweights = torch.where(keep, dweights * factor, 0)
        dropped = torch.where(keep, weights * factor, 0)
    delta = (weights * dweights).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta if call.dlse is None else dweights - delta + call.dlse[..., None])
    dproducts = dscores
    if slope is not None:  # which may be NaN at a masked position
        dproducts = dscores * (slope if reachable is None else torch.where(reachable, slope, 0))
    transposed = None if reachable is None else reachable.mT
    dquery = masked_product(dproducts, k, reachable) * scale if needs_dquery else None
    dkey = masked_product(dproducts.mT, q, transposed) * scale if needs_dkey else None
    dvalue = masked_product(dropped.mT, g, transposed) if needs_dvalue else None
    if groups > 1:
        dkey, dvalue = (d if d is None else d.unflatten(1, (-1, groups)).sum(2) for d in (dkey, dvalue))
    dquery, dkey, dvalue = (d if d is None else tokens_first(d, query.dtype) for d in (dquery, dkey, dvalue))
    dmask = None
    if needs_dmask:
        if mask.shape[3] == 1:
            dmask = row_mask_gradient(mask, call.lse, call.dlse)
        else:
            dmask = dscores.sum_to_size(mask.shape).to(mask.dtype).contiguous()
    return dquery, dkey, dvalue, dmask


def row_mask_gradient(mask: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """The gradient of a mask with one entry for all keys of a query.

    Such a mask shifts a whole row of scores, which changes the log-sum-exp and not the weights. Summing the gradients
    of the scores would give nothing but their rounding.
    """
    if dlse is None:
        return torch.zeros_like(mask, memory_format=torch.contiguous_format)
    gradient = torch.where(lse == -torch.inf, 0, dlse)[..., None]
    return gradient.sum_to_size(mask.shape).to(mask.dtype).contiguous()


def forward(call: Forward):
    return forward_dense(call) if call.cu_seqlens_q is None else packed.forward(call, forward_dense)


def backward(call: Backward):
    return backward_dense(call) if call.cu_seqlens_q is None else packed.backward(call, backward_dense)


implementation = Implementation(reference.backend, forward, backward)
