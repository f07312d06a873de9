"""The C++ kernels, called with tensors by keyword. Layouts that no stride describes are copied here."""

import os

import torch

from fastlm.backends import isa
from fastlm.backends.layout import dense_last, laid_out_like, matrix_of, rows_of, without_gaps
from fastlm.backends.pages import on_huge_pages
from fastlm.backends.reference import out_of_range, shift_gradient, starts_of
from fastlm.ops.boundary import mismatch

kernels = isa.kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if kernels else ()
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


def rows(x):
    """x as the kernels take rows: contiguous of any rank, or a matrix with a contiguous last dimension."""
    return x if x is None or x.is_contiguous() else rows_of(x)


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
    # Parameters that share memory (views of one tensor, say) are updated one after the other, each by its own call.
    runs = [slice(None)] if len(set(addresses)) == len(addresses) else [slice(i, i + 1) for i in range(len(addresses))]
    for run in runs:
        kernels.adamw(
            parameters=parameters[run],
            gradients=laid[run],
            exp_avgs=exp_avgs[run],
            exp_avg_sqs=exp_avg_sqs[run],
            masters=masters[run],
            steps=steps[run],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            factor=float(factor),
            zero_gradients=zero_gradients,
            threads=threads(),
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
    return kernels.sum_of_squares(tensors=dense, threads=threads())


# linear


def vector(bias):
    return bias if bias is None else bias.contiguous()


def linear_forward(x, weight, bias, layout):
    n = weight.shape[layout != "linear"]
    y = new(x, (*x.shape[:-1], n))
    if x.numel() == 0:
        return y
    kernels.linear_forward(
        x=rows(x),
        weight=matrix_of(weight),
        bias=vector(bias),
        y=y,
        conv1d=layout != "linear",
        threads=threads(),
    )
    return y


def linear_backward(dy, x, weight, layout, needed, wide=False):
    n, dtype = weight.shape[layout != "linear"], of_weights(x, wide)
    if x.numel() == 0:
        return new(x, x.shape, needed[0]), zeros(x, weight.shape, needed[1], dtype), zeros(x, n, needed[2], dtype)
    dx = new_like(x, needed[0])
    weight = matrix_of(weight)
    dweight, dbias = new_like(weight, needed[1], dtype), new(x, n, needed[2], dtype)
    kernels.linear_backward(
        dy=rows(dy),
        x=rows(x),
        weight=weight,
        dx=dx,
        dweight=dweight,
        dbias=dbias,
        conv1d=layout != "linear",
        threads=threads(),
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
        kernels.gelu_mlp_forward(
            x=rows(x),
            w1=matrix_of(w1),
            b1=vector(b1),
            w2=matrix_of(w2),
            b2=vector(b2),
            hidden=hidden,
            activated=activated,
            y=y,
            conv1d=layout != "linear",
            tanh=approximate == "tanh",
            threads=threads(),
        )
    return y, hidden, activated if recompute < 1 else None


def gelu_mlp_backward(dy, x, w1, b1, w2, hidden, activated, approximate, layout, needed, wide=False):
    out = layout != "linear"
    hidden_width, out_width = w1.shape[out], w2.shape[out]
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
    dx, dw1, db1, dw2, db2 = (new(x, *result) for result in results)
    hidden_known, activated_known = hidden is not None, activated is not None
    hidden_shape = (*x.shape[:-1], hidden_width)
    kernels.gelu_mlp_backward(
        dy=rows(dy),
        x=rows(x),
        w1=matrix_of(w1),
        b1=vector(b1),
        w2=matrix_of(w2),
        hidden=hidden if hidden_known else new(x, hidden_shape),
        hidden_known=hidden_known,
        activated=activated if activated_known else new(x, hidden_shape),
        activated_known=activated_known,
        dhidden=new(x, hidden_shape),
        dx=dx,
        dw1=dw1,
        db1=db1,
        dw2=dw2,
        db2=db2,
        conv1d=layout != "linear",
        tanh=approximate == "tanh",
        threads=threads(),
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
        kernels.layernorm_residual_forward(
            x=rows(x),
            residual=rows(residual),
            weight=single(weight),
            bias=single(bias),
            y=y,
            summed=summed,
            mean=mean,
            rstd=rstd,
            eps=eps,
            dropout_p=dropout_p,
            seed=0 if seed is None else seed.item(),
            threads=threads(),
        )
    return y, summed, mean, rstd


def layernorm_residual_backward(dy, dsummed, summed, weight, mean, rstd, seed, dropout_p, dtype, needed):
    width = weight.shape[0]
    if summed.numel() == 0:
        dx, dresidual = new(summed, summed.shape, needed[0], dtype), new(summed, summed.shape, needed[1])
        return dx, dresidual, zeros(weight, width, needed[2]), zeros(weight, width, needed[3])
    dx, dresidual, wide = new_like(summed, needed[0], dtype), new_like(summed, needed[1]), single(weight)
    dweight, dbias = new_like(wide, needed[2]), new_like(wide, needed[3])
    kernels.layernorm_residual_backward(
        dy=rows(dy),
        dsummed=rows(dsummed),
        summed=rows(summed),
        weight=wide,
        mean=mean,
        rstd=rstd,
        dx=dx,
        dresidual=dresidual,
        dweight=dweight,
        dbias=dbias,
        x_dtype=dtype,
        dropout_p=dropout_p,
        seed=0 if seed is None else seed.item(),
        threads=threads(),
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
    dx, count = new_like(x, needed[0]), x.numel() // width
    weight, row_scale = matrix_of(weight), row_scale if row_scale is None else row_scale.contiguous()
    chunk = -(
        -count // -(-count // max(1, LOGITS_BYTES // (4 * vocab)))
    )  # chunks of one size: a small last one would read all the weights for little
    logits, lse = new(x, (chunk, vocab), dtype=torch.float32), new(x, count, dtype=torch.float32)
    dweight, dbias = new_like(weight, needed[1], dtype), new(x, vocab, needed[2], dtype)
    # Products of several chunks are added up in float32.
    dweight_sum = new(x, weight.shape, needed[1] and dtype != torch.float32 and chunk < count, torch.float32)
    wrong = kernels.linear_cross_entropy_forward(
        x=rows(x),
        weight=weight,
        bias=vector(bias),
        target=target.reshape(-1),
        row_scale=row_scale,
        loss=loss,
        lse=lse,
        logits=logits,
        dx=dx,
        dweight=dweight,
        dweight_sum=dweight_sum,
        dbias=dbias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        threads=threads(),
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


def attend(query, key, value, mask, key_padding, seed, out, lse, scale, lower, upper, dropout_p, starts=((), ())):
    """Writes to out and lse. Tensors are (batch, head, token, dim), or (token, head, dim) with starts."""
    if query.numel() == 0 or key.numel() == 0:  # no one to look, or nothing to see
        out.zero_(), lse.fill_(-torch.inf)
        return
    kernels.attention_forward(
        query=dense_last(query),
        key=dense_last(key),
        value=dense_last(value),
        out=out,
        lse=lse,
        mask=mask,
        key_padding=key_padding,
        query_starts=starts[0],
        key_starts=starts[1],
        scale=scale,
        lower=lower,
        upper=upper,
        dropout_p=dropout_p,
        seed=0 if seed is None else seed.item(),
        threads=threads(),
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
    kernels.attention_backward(
        dout=torch.zeros_like(out) if dout is None else dense_last(dout),
        dlse=dlse if dlse is None else dlse.contiguous(),
        query=dense_last(query),
        key=dense_last(key),
        value=dense_last(value),
        out=dense_last(out),  # as it was, unless a hook on saved tensors changed its layout
        lse=lse,
        mask=mask,
        key_padding=key_padding,
        dquery=dquery,
        dkey=dkey,
        dvalue=dvalue,
        dmask=dmask,
        query_starts=starts[0],
        key_starts=starts[1],
        scale=scale,
        lower=lower,
        upper=upper,
        dropout_p=dropout_p,
        seed=0 if seed is None else seed.item(),
        threads=threads(),
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
    attend(query, key, value, None, None, seed, out, lse, scale, lower, upper, dropout_p, starts)
    return out, lse


def attention_varlen_backward(
    dout, dlse, query, key, value, cu_seqlens_q, cu_seqlens_k, seed, out, lse, scale, lower, upper, dropout_p, needed
):
    starts = all_starts(query, key, cu_seqlens_q, cu_seqlens_k)
    gradients = new_like(query), new_like(key), new_like(value)
    inputs = dout, dlse, query, key, value, None, None, seed, out, lse
    differentiate(*inputs, *gradients, None, scale, lower, upper, dropout_p, starts)
    return tuple(gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
