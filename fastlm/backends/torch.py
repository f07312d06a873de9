"""PyTorch's own fast operators: they serve where nothing is compiled, and where the table says that they are the faster ones.

What PyTorch does not do exactly as fastlm promises is refused, with the reason.
"""

import math

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.optim.adamw import adamw as functional_adamw

from fastlm.backends import reference
from fastlm.backends.reference import as_written, band_mask, check_targets
from fastlm.ops.boundary import PLAIN

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KNOWS_GROUPS = torch.__version__ >= "2.13"  # that its CPU kernel reads grouped heads as such was looked at from here on
LOGITS_BYTES = 64 << 20  # of one chunk, in all the types it is held in


def refuses(operator, device, dtype, **features):
    reasons = []
    if dtype not in DTYPES and not (operator == "adamw" and dtype.is_complex):
        reasons.append(f"computes in {', '.join(map(str, DTYPES))}, not {dtype}")
    if features.get("dropout"):
        reasons.append("draws its dropout masks otherwise than fastlm")
    if operator in ("attention", "attention_varlen"):
        if features["return_lse"]:
            reasons.append("has no log-sum-exp of a row that sees nothing, and no gradient of any")
        if features.get("mask_gradient"):
            reasons.append("gives no gradient of the mask")
        if device.type != "cpu" and features["masked"]:
            reasons.append(f"lets a NaN behind the mask through on {device.type}")
    return reasons


def flat_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


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
    targets = masters or parameters
    if masters:  # a parameter that others have changed is the truth, not its master copy
        for p, master in zip(parameters, masters, strict=True):
            master.copy_(torch.where(master.to(p.dtype) == p, master, p.to(master.dtype)))
    scaled = [gradient.to(target.dtype) for gradient, target in zip(gradients, targets, strict=True)]
    if not (isinstance(factor, float) and factor == 1.0):
        scaled = list(torch._foreach_mul(scaled, factor))
    moments = [*exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs]
    functional_adamw(
        targets,
        scaled,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        fused=fusable(targets, scaled, moments, steps) or None,
        has_complex=any(p.is_complex() for p in targets),
        amsgrad=bool(max_exp_avg_sqs),
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    torch.autograd.graph.increment_version([*targets, *moments])  # which PyTorch's fused kernels leave out
    if masters:
        torch._foreach_copy_(parameters, masters)
    if zero_gradients:
        torch._foreach_zero_(gradients)


def fusable(targets, gradients, moments, steps):
    """Whether PyTorch's fused kernels can serve: they walk through memory, and on a CPU they do not look whether all lies in one order."""
    first = targets[0]
    if (
        first.device.type not in ("cpu", "cuda", "xpu")
        or not first.is_floating_point()
        or steps[0].device != first.device
    ):
        return False
    return all(
        (type(x) in PLAIN or isinstance(x, FakeTensor)) and x.is_contiguous() for x in (*targets, *gradients, *moments)
    )


def sum_of_squares(tensors):
    wide = torch.float64 if tensors[0].dtype in (torch.float64, torch.complex128) else torch.float32
    squares = [torch.linalg.vector_norm(x, dtype=x.dtype if x.is_complex() else wide).square() for x in tensors]
    total = torch.stack(
        [s.full_tensor() if hasattr(s, "full_tensor") else s for s in squares]
    ).sum()  # a DTensor's, over all processes
    return total


# linear


def linear(x, weight, bias, layout):
    if layout == "linear":
        return torch.nn.functional.linear(x, weight, bias).contiguous()
    flat = flat_rows(x)
    return (torch.mm(flat, weight) if bias is None else torch.addmm(bias, flat, weight)).view(
        *x.shape[:-1], weight.shape[1]
    )


linear_forward = as_written(linear)


@as_written
def linear_backward(dy, x, weight, layout, needed):
    flat, gradient = flat_rows(x), flat_rows(dy)
    dx = torch.mm(gradient, weight if layout == "linear" else weight.t()).view(x.shape) if needed[0] else None
    dweight = (
        (torch.mm(gradient.t(), flat) if layout == "linear" else torch.mm(flat.t(), gradient)) if needed[1] else None
    )
    return dx, dweight, gradient.sum(0) if needed[2] else None


# gelu_mlp


@as_written
def gelu_mlp_forward(x, w1, b1, w2, b2, approximate, layout, recompute):
    hidden = linear_forward(x, w1, b1, layout)
    activated = torch.nn.functional.gelu(hidden, approximate=approximate)
    return (
        linear_forward(activated, w2, b2, layout),
        hidden if recompute < 2 else None,
        activated if recompute < 1 else None,
    )


@as_written
def gelu_mlp_backward(dy, x, w1, b1, w2, hidden, activated, approximate, layout, needed):
    if hidden is None:
        hidden = linear_forward(x, w1, b1, layout)
    if activated is None and needed[3]:
        activated = torch.nn.functional.gelu(hidden, approximate=approximate)
    dactivated, dw2, db2 = linear_backward(
        dy, hidden if activated is None else activated, w2, layout, (any(needed[:3]), *needed[3:])
    )
    if dactivated is None:
        return None, None, None, dw2, db2
    dhidden = aten.gelu_backward.grad_input(
        dactivated, hidden, approximate=approximate, grad_input=dactivated
    )  # in its place: fresh pages cost as much
    return *linear_backward(dhidden, x, w1, layout, needed[:3]), dw2, db2


# layernorm_residual


def statistics_weight(weight, dtype):
    """The weight in the dtype that the statistics shall have: in 16 bits they would be rounded, and PyTorch's kernel be slower."""
    return weight if weight is None or dtype == torch.float64 else weight.float()


@as_written
def layernorm_residual_forward(x, residual, weight, bias, seed, eps, dropout_p):
    summed = None if residual is None else torch.add(residual, x).contiguous()
    w, b = statistics_weight(weight, x.dtype), statistics_weight(bias, x.dtype)
    y, mean, rstd = torch.native_layer_norm(x if summed is None else summed, w.shape, w, b, eps)
    return y.to(x.dtype).contiguous(), summed, mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


@as_written
def layernorm_residual_backward(dy, dsummed, summed, weight, mean, rstd, seed, dropout_p, dtype, needed):
    needs_dx, needs_dresidual, needs_dweight, needs_dbias = needed
    ds, dweight, dbias = dsummed, None, None
    if dy is None:
        dweight, dbias = (torch.zeros_like(weight) if need else None for need in needed[2:])
    else:
        w = statistics_weight(weight, dtype)
        statistics = mean[..., None], rstd[..., None]
        ds, dweight, dbias = aten.native_layer_norm_backward(
            dy.to(summed.dtype),
            summed,
            w.shape,
            *statistics,
            w,
            w,
            [needs_dx or needs_dresidual, needs_dweight, needs_dbias],
        )
        dweight, dbias = (
            d.to(weight.dtype) if need else None for d, need in ((dweight, needs_dweight), (dbias, needs_dbias))
        )
        if ds is not None and dsummed is not None:
            ds.add_(dsummed)
    return ds.to(dtype).contiguous() if needs_dx else None, ds.contiguous() if needs_dresidual else None, dweight, dbias


# linear_cross_entropy: by chunks of rows for the products, and within them by blocks that stay in the cache while they are swept. The logits of
# a block become its softmax, then its gradient, in the same memory, in float32.


@as_written
def linear_cross_entropy_forward(x, weight, bias, target, row_scale, ignore_index, label_smoothing, needed):
    vocab = weight.shape[0]
    check_targets(target, vocab, ignore_index)
    flat, targets = flat_rows(x), target.reshape(-1)
    row_scale = row_scale if row_scale is None else row_scale.reshape(-1)
    rows = flat.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    loss = x.new_empty(rows, dtype=wide)
    dx = x.new_empty(flat.shape) if needed[0] else None
    dweight = None if rows else torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dbias = weight.new_zeros(vocab, dtype=wide) if needed[2] else None
    chunk = min(rows, max(1, LOGITS_BYTES * 15 // 16 // (vocab * x.element_size())))
    block = min(chunk, max(1, LOGITS_BYTES // 16 // (vocab * wide.itemsize)))
    memory = x.new_empty(chunk, vocab)
    wide_memory = None if x.dtype == wide else x.new_empty(block, vocab, dtype=wide)
    for begin in range(0, rows, max(1, chunk)):
        part = flat[begin : begin + chunk]
        product = memory[: part.shape[0]]
        torch.mm(part, weight.t(), out=product) if bias is None else torch.addmm(bias, part, weight.t(), out=product)
        for first in range(0, part.shape[0], block):
            near, at = product[first : first + block], slice(begin + first, begin + min(first + block, chunk))
            logits = near if wide_memory is None else wide_memory[: near.shape[0]].copy_(near)
            scale = row_scale[at] if any(needed) else None
            loss[at] = losses_then_gradients(logits, targets[at], scale, ignore_index, label_smoothing)
            if dbias is not None:
                dbias += logits.sum(0)
            if wide_memory is not None and scale is not None:
                near.copy_(logits)
        if dx is not None:
            torch.mm(product, weight, out=dx[begin : begin + chunk])
        if needed[1]:
            dweight = add_product(dweight, product.t(), part, begin + chunk >= rows)
    return (
        loss.view(target.shape),
        dx if dx is None else dx.view(x.shape),
        dweight if needed[1] else None,
        dbias if dbias is None else dbias.to(x.dtype),
    )


def losses_then_gradients(logits, targets, scale, ignore_index, label_smoothing):
    """The losses of some rows; their logits become d(scale · loss)/d(logits), or with no scale the softmax."""
    ignored = targets == ignore_index
    wanted = torch.where(ignored, 0, targets)[:, None]
    # The sum of exponentials is 1 / the largest probability: no second sweep over them. All is taken relative to the largest
    # logit, as the loss of a target that is nearly certain is lost in the difference of two large numbers otherwise.
    top = logits.amax(1)
    losses = top - logits.gather(1, wanted)[:, 0]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (top - logits.mean(1))
    aten._softmax.out(logits, 1, False, out=logits)
    losses = losses - logits.amax(1).log()
    if scale is not None:
        scale = scale.masked_fill(ignored, 0)[:, None]
        if label_smoothing:
            logits.sub_(label_smoothing / logits.shape[1])
        logits.mul_(scale).scatter_add_(1, wanted, scale * (label_smoothing - 1))
    return losses.masked_fill_(ignored, 0)


def add_product(total, a, b, last):
    """total + a @ b. 16-bit products of several chunks are added up in float32, and rounded to 16 bits after the last."""
    if total is None:
        return torch.mm(a, b)
    if a.dtype in (torch.float32, torch.float64):
        return total.addmm_(a, b)
    product = torch.mm(a, b)
    return torch.add(total, product, out=product) if last else total.float().add_(product)


# attention


def dense(*tensors):
    """PyTorch's kernel reads its last dimension as contiguous without looking."""
    return (t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def ungrouped(query, key, value):
    """Each key head once for every query head that shares it, for a PyTorch that wants it so."""
    groups = 1 if KNOWS_GROUPS else query.shape[1] // key.shape[1]
    return reference.grouped(key, groups), reference.grouped(value, groups)


def additive(query, key, mask, key_padding, lower, upper):
    """(additive mask or None, is_causal) for PyTorch, whose causal mask starts at the top left."""
    causal = upper == 0 and lower <= 1 - query.shape[2]
    hidden = [] if causal else [band_mask(query, key, lower, upper)]
    hidden.append(None if key_padding is None else key_padding[:, None, None, :])
    bias = None
    if mask is not None:
        if mask.dtype == torch.bool:
            hidden.append(mask)
        else:
            bias = mask
    hidden = [where for where in hidden if where is not None]
    if hidden:
        seen = hidden[0]
        for more in hidden[1:]:
            seen = seen & more
        bias = query.new_zeros(()) if bias is None else bias
        bias = torch.where(seen, bias, -torch.inf)
        bias = bias if bias.dim() == 4 else bias[None, None]
    return bias, causal


def harmed(query, key, value, bias, causal):
    """A NaN or Inf where PyTorch would not do as promised: in queries or keys (a row of nothing but NaN scores gives 0), or in values that are masked."""
    looked_at = (query, key, value) if bias is not None or causal else (query, key)
    dtype = (
        torch.float32 if query.dtype == torch.float16 else query.dtype
    )  # whose sums would overflow; those of bfloat16 round, no harm
    # Over heads and dimensions first: one sum over everything takes PyTorch four times as long.
    return not all(math.isfinite(x.transpose(1, 2).sum((2, 3), dtype=dtype).sum().item()) for x in looked_at)


def tokens_first(x):
    """As reference.tokens_first, where PyTorch chose otherwise."""
    return x if x.transpose(1, 2).is_contiguous() else reference.tokens_first(x, x.dtype)


@as_written
def attention_forward(query, key, value, mask, key_padding, seed, scale, lower, upper, dropout_p):
    on_cpu = query.device.type == "cpu"
    bias, causal = additive(query, key, mask, key_padding, lower, upper)
    if query.numel() == 0 or key.numel() == 0 or (on_cpu and harmed(query, key, value, bias, causal)):
        return reference.attention_forward(query, key, value, mask, key_padding, seed, scale, lower, upper, dropout_p)
    if on_cpu:
        query, key, value = dense(query, *ungrouped(query, key, value))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
        return tokens_first(out), lse
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return tokens_first(out), query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@as_written
def attention_backward(
    dout, dlse, query, key, value, mask, key_padding, seed, out, lse, scale, lower, upper, dropout_p, needed
):
    on_cpu = query.device.type == "cpu"
    bias, causal = additive(query, key, mask, key_padding, lower, upper)
    if query.numel() == 0 or key.numel() == 0 or not on_cpu or harmed(query, key, value, bias, causal):
        return reference.attention_backward(
            dout, dlse, query, key, value, mask, key_padding, seed, out, lse, scale, lower, upper, dropout_p, needed
        )
    key_heads = key.shape[1]
    query, key, value, dout = dense(query, *ungrouped(query, key, value), dout)
    dquery, dkey, dvalue = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, query, key, value, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )
    if key.shape[1] != key_heads:
        dkey, dvalue = (d.unflatten(1, (key_heads, -1)).sum(2) for d in (dkey, dvalue))
    return *(
        tokens_first(d) if need else None for d, need in zip((dquery, dkey, dvalue), needed[:3], strict=True)
    ), None


# attention_varlen: sequence by sequence


@as_written
def attention_varlen_forward(query, key, value, cu_seqlens_q, cu_seqlens_k, seed, scale, lower, upper, dropout_p):
    def attend(number, q, k, v, moved):
        return attention_forward(q, k, v, None, None, seed, scale, lower + moved, upper + moved, dropout_p)

    return reference.gather_forward(attend, query, key, value, cu_seqlens_q, cu_seqlens_k)


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
        )

    return reference.gather_backward(
        differentiate, dout, dlse, query, key, value, cu_seqlens_q, cu_seqlens_k, out, lse, needed
    )
