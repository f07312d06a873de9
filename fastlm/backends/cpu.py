"""The C++ kernels: tensors become addresses and sizes here, and nowhere else."""

import os

import torch

from fastlm.backends import isa
from fastlm.backends.layout import dense_last, laid_out_like, matrix_of, rows_and_stride, rows_if, without_gaps
from fastlm.backends.pages import on_huge_pages
from fastlm.backends.reference import out_of_range, shift_gradient, starts_of
from fastlm.ops.boundary import mismatch

kernels = isa.kernels
DTYPES = (
    {
        dtype: getattr(kernels.dtype, str(dtype).removeprefix("torch."))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    if kernels
    else {}
)
GRADIENTS_ARE_SUMS = True  # of weights: with wide=True in float32, as they are added up, whatever the weights' type
LOGITS_BYTES = 64 << 20  # of one chunk

ADAMW_REFUSES = {
    "amsgrad": "has no amsgrad",
    "gaps": "updates parameters that fill one piece of memory",
    "mixed": "takes gradients in their parameter's type",
    "subclass": "takes plain tensors",
}

threads = torch.get_num_threads


def one_thread() -> int:
    return 1


def after_fork() -> None:
    """libgomp cannot start threads in a forked child whose parent had some."""
    global threads
    threads = one_thread


if hasattr(os, "register_at_fork"):  # where there is a fork
    os.register_at_fork(after_in_child=after_fork)


def unavailable():
    return [] if kernels else [f"is not compiled here: {isa.missing}"]


def refuses(operator, device, dtype, **features):
    reasons = unavailable()
    if reasons:
        return reasons
    if not hasattr(kernels, operator) and not hasattr(
        kernels, f"{operator.removesuffix('_varlen')}_forward"
    ):  # one kernel for batches of every kind
        reasons.append(f"has no {operator}")
    if device.type != "cpu":
        reasons.append(f"serves CPU tensors, not {device}")
    if dtype not in DTYPES:
        reasons.append(f"computes in {', '.join(map(str, DTYPES))}, not {dtype}")
    if operator == "adamw":
        reasons += [why for feature, why in ADAMW_REFUSES.items() if features[feature]]
    return reasons


def at(tensor):
    """The address of a tensor, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def new(x, shape, wanted=True, dtype=None):
    return on_huge_pages(torch.empty(shape, dtype=dtype or x.dtype, device=x.device)) if wanted else None


def new_like(x, wanted=True, dtype=None):
    """Contiguous, and half the price of new_empty."""
    return on_huge_pages(torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)) if wanted else None


def zeros(x, shape, wanted=True, dtype=None):
    return x.new_zeros(shape, dtype=dtype) if wanted else None


def of_weights(x, wide):
    """The dtype of gradients of weights."""
    return torch.float32 if wide else x.dtype


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
    if not parameters:
        return
    laid = [laid_out_like(gradient, p) for gradient, p in zip(gradients, parameters, strict=True)]
    for name, tensors, dtype in (
        ("gradient", laid, parameters[0].dtype),
        ("exp_avg", exp_avgs, None),
        ("exp_avg_sq", exp_avg_sqs, None),
    ):
        check_fits(name, tensors, parameters, dtype or exp_avgs[0].dtype)
    check_fits("master_param", masters, parameters[: len(masters)], torch.float32)
    check_fits("step", steps, [SCALAR] * len(parameters), torch.float32)
    addresses = [p.data_ptr() for p in parameters]
    # Two parameters of one memory (views of a tensor, say) are updated one after the other, as if each had a call of its own.
    runs = [slice(None)] if len(set(addresses)) == len(addresses) else [slice(i, i + 1) for i in range(len(addresses))]
    for run in runs:
        kernels.adamw(
            DTYPES[parameters[0].dtype],
            DTYPES[exp_avgs[0].dtype],
            addresses[run],
            [g.data_ptr() for g in laid[run]],
            [m.data_ptr() for m in exp_avgs[run]],
            [v.data_ptr() for v in exp_avg_sqs[run]],
            [w.data_ptr() for w in masters[run]],
            [t.data_ptr() for t in steps[run]],
            [p.numel() for p in parameters[run]],
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            float(factor),
            zero_gradients,
            threads(),
        )
    written = [*parameters, *exp_avgs, *exp_avg_sqs, *masters, *steps]
    if zero_gradients:
        written += gradients
        for copy, gradient in zip(laid, gradients, strict=True):
            if copy is not gradient:
                gradient.zero_()
    torch.autograd.graph.increment_version(written)  # autograd's checks of saved tensors see the update


SCALAR = torch.zeros((), device="cpu")


def check_fits(name, tensors, parameters, dtype):
    """State is the user's to load and change: what does not fit its parameter must not reach the kernel."""
    for x, p in zip(tensors, parameters, strict=True):
        same_order = x.stride() == p.stride() or (x.is_contiguous() and p.is_contiguous())
        if x.dtype != dtype or not x.is_cpu or x.shape != p.shape or not same_order:
            wanted = f"{dtype} on cpu, shape {tuple(p.shape)} and strides {p.stride()} as its parameter's"
            raise mismatch(name, wanted, f"{x.dtype} on {x.device}, shape {tuple(x.shape)} and strides {x.stride()}")


def sum_of_squares(tensors):
    """Of all elements of all tensors, which have one dtype."""
    dense = [x if x.is_contiguous() or without_gaps(x) else x.contiguous() for x in tensors]
    return kernels.sum_of_squares(
        DTYPES[dense[0].dtype], [x.data_ptr() for x in dense], [x.numel() for x in dense], threads()
    )


# linear


def by_layout(weight, layout):
    """(k_stride, n_stride): the strides of a weight along its input and its output."""
    n, k = weight.stride()
    return (k, n) if layout == "linear" else (n, k)


def vector(bias):
    return bias if bias is None else bias.contiguous()


def linear_forward(x, weight, bias, layout):
    n = weight.shape[layout != "linear"]
    y = new(x, (*x.shape[:-1], n))
    if x.numel() == 0:
        return y
    (x, x_stride), weight, bias = rows_and_stride(x), matrix_of(weight), vector(bias)
    k = x.shape[-1]
    kernels.linear_forward(
        DTYPES[x.dtype],
        x.data_ptr(),
        x_stride,
        weight.data_ptr(),
        *by_layout(weight, layout),
        at(bias),
        y.data_ptr(),
        x.numel() // k,
        k,
        n,
        threads(),
    )
    return y


def linear_backward(dy, x, weight, layout, needed, wide=False):
    n, dtype = weight.shape[layout != "linear"], of_weights(x, wide)
    if x.numel() == 0:
        return new(x, x.shape, needed[0]), zeros(x, weight.shape, needed[1], dtype), zeros(x, n, needed[2], dtype)
    dx = new_like(x, needed[0])
    (dy, dy_stride), (x, x_stride), weight = rows_and_stride(dy), rows_and_stride(x), matrix_of(weight)
    dweight, dbias, k = new_like(weight, needed[1], dtype), new(x, n, needed[2], dtype), x.shape[-1]
    kernels.linear_backward(
        DTYPES[x.dtype],
        DTYPES[dtype],
        dy.data_ptr(),
        dy_stride,
        x.data_ptr(),
        x_stride,
        weight.data_ptr(),
        *by_layout(weight, layout),
        at(dx),
        at(dweight),
        *((1, k) if layout == "linear" else (n, 1)),
        at(dbias),
        x.numel() // k,
        k,
        n,
        threads(),
    )
    return dx, dweight, dbias


# gelu_mlp


def gelu_mlp_forward(x, w1, b1, w2, b2, approximate, layout, recompute):
    out = layout != "linear"
    hidden_width, out_width = w1.shape[out], w2.shape[out]
    y = new(x, (*x.shape[:-1], out_width))
    hidden = new(x, (*x.shape[:-1], hidden_width), recompute < 2)
    activated = new(x, (*x.shape[:-1], hidden_width))
    if x.numel():
        (x, x_stride), w1, b1, w2, b2 = rows_and_stride(x), matrix_of(w1), vector(b1), matrix_of(w2), vector(b2)
        width = x.shape[-1]
        kernels.gelu_mlp_forward(
            DTYPES[x.dtype],
            x.data_ptr(),
            x_stride,
            w1.data_ptr(),
            *by_layout(w1, layout),
            at(b1),
            w2.data_ptr(),
            *by_layout(w2, layout),
            at(b2),
            at(hidden),
            activated.data_ptr(),
            y.data_ptr(),
            x.numel() // width,
            width,
            hidden_width,
            out_width,
            approximate == "tanh",
            threads(),
        )
    return y, hidden, activated if recompute < 1 else None


def gelu_mlp_backward(dy, x, w1, b1, w2, hidden, activated, approximate, layout, needed, wide=False):
    out = layout != "linear"
    hidden_width, out_width, width = w1.shape[out], w2.shape[out], x.shape[-1]
    results = tuple(
        zip(
            (x.shape, w1.shape, hidden_width, w2.shape, out_width),
            needed,
            (x.dtype, *(of_weights(x, wide),) * 4),
            strict=True,
        )
    )
    if x.numel() == 0:
        return tuple(zeros(x, *result) for result in results)
    (dy, dy_stride), (x, x_stride), w1, b1, w2 = (
        rows_and_stride(dy),
        rows_and_stride(x),
        matrix_of(w1),
        vector(b1),
        matrix_of(w2),
    )
    rows = x.numel() // width
    dx, dw1, db1, dw2, db2 = (new(x, *result) for result in results)
    hidden_known, activated_known = hidden is not None, activated is not None
    hidden = hidden if hidden_known else new(x, (rows, hidden_width))
    activated = activated if activated_known else new(x, (rows, hidden_width))
    dhidden = new(x, (rows, hidden_width))
    linear = layout == "linear"
    kernels.gelu_mlp_backward(
        DTYPES[x.dtype],
        DTYPES[of_weights(x, wide)],
        dy.data_ptr(),
        dy_stride,
        x.data_ptr(),
        x_stride,
        w1.data_ptr(),
        *by_layout(w1, layout),
        at(b1),
        w2.data_ptr(),
        *by_layout(w2, layout),
        hidden.data_ptr(),
        hidden_known,
        activated.data_ptr(),
        activated_known,
        dhidden.data_ptr(),
        at(dx),
        at(dw1),
        at(db1),
        at(dw2),
        at(db2),
        *((1, width, 1, hidden_width) if linear else (hidden_width, 1, out_width, 1)),
        rows,
        width,
        hidden_width,
        out_width,
        approximate == "tanh",
        threads(),
    )
    return dx, dw1, db1, dw2, db2


# layernorm_residual


def single(parameter):
    """A weight or bias as the kernels take it: float32, one after the other."""
    return (
        parameter
        if parameter is None or (parameter.dtype == torch.float32 and parameter.is_contiguous())
        else parameter.float().contiguous()
    )


def layernorm_residual_forward(x, residual, weight, bias, seed, eps, dropout_p):
    stream = x if residual is None else residual
    y = new_like(x)
    summed = new_like(stream, residual is not None or seed is not None)
    mean, rstd = new(x, x.shape[:-1], dtype=torch.float32), new(x, x.shape[:-1], dtype=torch.float32)
    if x.numel():
        (x, x_stride), (residual, residual_stride), weight, bias = (
            rows_and_stride(x),
            rows_if(residual),
            single(weight),
            single(bias),
        )
        width = x.shape[-1]
        kernels.layernorm_residual_forward(
            DTYPES[x.dtype],
            DTYPES[stream.dtype],
            x.data_ptr(),
            x_stride,
            at(residual),
            residual_stride,
            weight.data_ptr(),
            at(bias),
            y.data_ptr(),
            at(summed),
            mean.data_ptr(),
            rstd.data_ptr(),
            x.numel() // width,
            width,
            eps,
            dropout_p,
            0 if seed is None else seed.item(),
            threads(),
        )
    return y, summed, mean, rstd


def layernorm_residual_backward(dy, dsummed, summed, weight, mean, rstd, seed, dropout_p, dtype, needed):
    width = weight.shape[0]
    if summed.numel() == 0:
        dx, dresidual = new(summed, summed.shape, needed[0], dtype), new(summed, summed.shape, needed[1])
        return dx, dresidual, zeros(weight, width, needed[2]), zeros(weight, width, needed[3])
    dx, dresidual, wide = new_like(summed, needed[0], dtype), new_like(summed, needed[1]), single(weight)
    (dy, dy_stride), (dsummed, dsummed_stride), (summed, summed_stride) = (
        rows_if(dy),
        rows_if(dsummed),
        rows_and_stride(summed),
    )
    dweight, dbias = new_like(wide, needed[2]), new_like(wide, needed[3])
    kernels.layernorm_residual_backward(
        DTYPES[dtype],
        DTYPES[summed.dtype],
        at(dy),
        dy_stride,
        at(dsummed),
        dsummed_stride,
        summed.data_ptr(),
        summed_stride,
        wide.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        at(dx),
        at(dresidual),
        at(dweight),
        at(dbias),
        summed.numel() // width,
        width,
        dropout_p,
        0 if seed is None else seed.item(),
        threads(),
    )
    return dx, dresidual, *(d if d is None else d.to(weight.dtype) for d in (dweight, dbias))


# linear_cross_entropy


def linear_cross_entropy_forward(x, weight, bias, target, row_scale, ignore_index, label_smoothing, needed, wide=False):
    (vocab, width), dtype = weight.shape, of_weights(x, wide)
    loss = new(x, target.shape, dtype=torch.float32)
    if x.numel() == 0:
        return (
            loss,
            new(x, x.shape, needed[0]),
            zeros(x, weight.shape, needed[1], dtype),
            zeros(x, vocab, needed[2], dtype),
        )
    dx, rows = new_like(x, needed[0]), x.numel() // width
    (x, x_stride), weight, bias, targets = rows_and_stride(x), matrix_of(weight), vector(bias), target.reshape(-1)
    chunk = -(
        -rows // -(-rows // max(1, LOGITS_BYTES // (4 * vocab)))
    )  # chunks of one size: a small last one would read all the weights for little
    logits, lse = new(x, (chunk, vocab), dtype=torch.float32), new(x, rows, dtype=torch.float32)
    row_scale = row_scale if row_scale is None else row_scale.contiguous()
    dweight, dbias = new_like(weight, needed[1], dtype), new(x, vocab, needed[2], dtype)
    # Products of several chunks are added up in float32.
    dweight_sum = new(x, weight.shape, needed[1] and dtype != torch.float32 and chunk < rows, torch.float32)
    wrong = kernels.linear_cross_entropy_forward(
        DTYPES[x.dtype],
        DTYPES[dtype],
        x.data_ptr(),
        x_stride,
        weight.data_ptr(),
        *by_layout(weight, "linear"),
        at(bias),
        targets.data_ptr(),
        targets.stride(0),
        at(row_scale),
        loss.data_ptr(),
        lse.data_ptr(),
        logits.data_ptr(),
        chunk,
        at(dx),
        at(dweight),
        at(dweight_sum),
        at(dbias),
        rows,
        width,
        vocab,
        ignore_index,
        label_smoothing,
        threads(),
    )
    if wrong >= 0:
        raise out_of_range(
            target, tuple(int(i) for i in torch.unravel_index(torch.tensor(wrong), target.shape)), vocab, ignore_index
        )
    return loss, dx, dweight, dbias


# attention


def tokens_first(x, wanted=True):
    """Memory for a result like x, (B, H, T, D), that lies as (B, T, H, D): merging its heads is then a view."""
    if not wanted:
        return None
    batch, heads, length, head_dim = x.shape
    return new(x, (batch, length, heads, head_dim)).transpose(1, 2)


def steps(x):
    """(batch, head, token) strides."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def unexpanded(x, rank):
    """Strides for a mask that is read as if it had been expanded."""
    return (
        (0,) * rank
        if x is None
        else tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    )


def mask_type(mask, dtype):
    if mask is None:
        return 0
    return 1 if mask.dtype == torch.bool else 2 if mask.dtype == dtype else 3


def sizes(query, key, starts):
    batch, heads, query_len, head_dim = query.shape
    return len(starts[0]) - 1 if starts[0] else batch, heads, key.shape[1], query_len, key.shape[2], head_dim


def attend(query, key, value, mask, key_padding, seed, out, lse, scale, lower, upper, dropout_p, starts=((), ())):
    """Writes to out and lse. All tensors are (batch, head, token, dim); a packed batch, with its starts, is one whose sequences are a stride of 0 apart."""
    if query.numel() == 0 or key.numel() == 0:  # no one to look, or nothing to see
        out.zero_(), lse.fill_(-torch.inf)
        return
    query, key, value = dense_last(query), dense_last(key), dense_last(value)
    kernels.attention_forward(
        DTYPES[query.dtype],
        query.data_ptr(),
        steps(query),
        key.data_ptr(),
        steps(key),
        value.data_ptr(),
        steps(value),
        out.data_ptr(),
        steps(out),
        lse.data_ptr(),
        at(mask),
        mask_type(mask, query.dtype),
        unexpanded(mask, 4),
        at(key_padding),
        unexpanded(key_padding, 2),
        sizes(query, key, starts),
        *starts,
        scale,
        lower,
        upper,
        dropout_p,
        0 if seed is None else seed.item(),
        threads(),
    )


def differentiate(
    dout,
    dlse,
    query,
    key,
    value,
    mask,
    key_padding,
    seed,
    out,
    lse,
    dquery,
    dkey,
    dvalue,
    dmask,
    scale,
    lower,
    upper,
    dropout_p,
    starts=((), ()),
):
    """Writes to the gradients. The kernel makes the three together; what is not needed is dropped."""
    if query.numel() == 0 or key.numel() == 0:
        dquery.zero_(), dkey.zero_(), dvalue.zero_()
        return
    query, key, value = dense_last(query), dense_last(key), dense_last(value)
    dout = torch.zeros_like(out) if dout is None else dense_last(dout)
    dlse = dlse if dlse is None else dlse.contiguous()
    out = dense_last(out)  # as it was, unless a hook on saved tensors laid it out anew
    kernels.attention_backward(
        DTYPES[query.dtype],
        dout.data_ptr(),
        steps(dout),
        query.data_ptr(),
        steps(query),
        key.data_ptr(),
        steps(key),
        value.data_ptr(),
        steps(value),
        out.data_ptr(),
        steps(out),
        lse.data_ptr(),
        at(dlse),
        at(mask),
        mask_type(mask, query.dtype),
        unexpanded(mask, 4),
        at(key_padding),
        unexpanded(key_padding, 2),
        dquery.data_ptr(),
        steps(dquery),
        dkey.data_ptr(),
        steps(dkey),
        dvalue.data_ptr(),
        steps(dvalue),
        at(dmask),
        unexpanded(dmask, 4),
        sizes(query, key, starts),
        *starts,
        scale,
        lower,
        upper,
        dropout_p,
        0 if seed is None else seed.item(),
        threads(),
    )


def attention_forward(query, key, value, mask, key_padding, seed, scale, lower, upper, dropout_p):
    out, lse = tokens_first(query), new(query, query.shape[:3], dtype=torch.float32)
    attend(query, key, value, mask, key_padding, seed, out, lse, scale, lower, upper, dropout_p)
    return out, lse


def attention_backward(
    dout, dlse, query, key, value, mask, key_padding, seed, out, lse, scale, lower, upper, dropout_p, needed
):
    needs_query, needs_key, needs_value, needs_mask = needed
    dquery, dkey, dvalue = tokens_first(query), tokens_first(key), tokens_first(value)
    shifts = needs_mask and mask.shape[3] == 1
    dmask = mask.new_zeros(mask.shape, dtype=torch.float32) if needs_mask and not shifts else None
    gradients = dquery, dkey, dvalue, dmask
    differentiate(
        dout, dlse, query, key, value, mask, key_padding, seed, out, lse, *gradients, scale, lower, upper, dropout_p
    )
    return (
        dquery if needs_query else None,
        dkey if needs_key else None,
        dvalue if needs_value else None,
        shift_gradient(mask, lse, dlse) if shifts else dmask.to(mask.dtype) if needs_mask else None,
    )


# attention_varlen


def packed(x):
    """(T, H, D) as a (1, H, T, D) in which every sequence of a batch begins where the batch does."""
    x = dense_last(x)
    tokens, heads, head_dim = x.shape
    token_stride, head_stride, _ = x.stride()
    return x.as_strided((1, heads, tokens, head_dim), (0, head_stride, token_stride, 1))


def all_starts(query, key, cu_seqlens_q, cu_seqlens_k):
    """Checked: nothing wrong reaches the kernels."""
    starts_q, starts_k = (
        starts_of("cu_seqlens_q", cu_seqlens_q, query.shape[0]),
        starts_of("cu_seqlens_k", cu_seqlens_k, key.shape[0]),
    )
    return starts_q, starts_k


def attention_varlen_forward(query, key, value, cu_seqlens_q, cu_seqlens_k, seed, scale, lower, upper, dropout_p):
    starts = all_starts(query, key, cu_seqlens_q, cu_seqlens_k)
    out, lse = new_like(query), new(query, query.shape[1::-1], dtype=torch.float32)
    attend(
        packed(query),
        packed(key),
        packed(value),
        None,
        None,
        seed,
        packed(out),
        lse,
        scale,
        lower,
        upper,
        dropout_p,
        starts,
    )
    return out, lse


def attention_varlen_backward(
    dout, dlse, query, key, value, cu_seqlens_q, cu_seqlens_k, seed, out, lse, scale, lower, upper, dropout_p, needed
):
    starts = all_starts(query, key, cu_seqlens_q, cu_seqlens_k)
    gradients = new_like(query), new_like(key), new_like(value)
    dout = torch.zeros_like(out) if dout is None else dout
    inputs = packed(dout), dlse, packed(query), packed(key), packed(value), None, None, seed, packed(out), lse
    differentiate(*inputs, *map(packed, gradients), None, scale, lower, upper, dropout_p, starts)
    return tuple(gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
