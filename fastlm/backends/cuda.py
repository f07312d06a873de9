"""The CUDA C++ kernels, called with tensors by keyword. Layouts that no stride describes are copied here."""

import functools
import importlib
from types import ModuleType

import torch

from fastlm.backends import isa
from fastlm.backends import torch as native
from fastlm.backends.gpu import (
    DTYPES,
    attention_operators,
    beyond,
    losses_and_gradients,
    new_like,
    new_of_rows,
    on,
    precision,
    vector,
)
from fastlm.backends.layout import dense_last, matrix_of, rows_of
from fastlm.backends.reference import as_written, check_targets

LOGITS_BYTES = 64 << 20  # of one chunk
OLDEST_ARCH = 80  # the kernels use mma.sync of bfloat16 and cp.async


def find() -> tuple[ModuleType | None, str]:
    """(module, why there is none)."""
    try:
        return importlib.import_module("fastlm._cuda"), ""
    except ModuleNotFoundError:
        return (
            None,
            f"is not compiled here: {isa.report().get('cuda', {}).get('reason') or 'the extension was not built'}",
        )
    except ImportError as broken:  # built, but for another Python or with a library that is missing
        return None, f"does not load ({broken})"


kernels, missing = find()
device_type = "cuda"  # of the tensors that the kernels accept


def use_module(module, accepts="cuda"):
    """Launch the kernels of `module`, which has the functions of fastlm._cuda and accepts tensors of the device type `accepts`."""
    global kernels, device_type
    kernels, device_type = module, accepts
    unavailable.cache_clear()


def version(number: int) -> str:
    """13.0 of CUDA's 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


OLDEST_DRIVERS = {12: "525", 13: "580"}  # what NVIDIA says that a major version of CUDA needs


def in_words():
    """What was built, for fastlm.info()."""
    built = isa.report().get("cuda", {})
    if kernels is None:
        return missing.removeprefix("is ")
    number = built.get("version", "") or version(kernels.runtime_version())
    driver = OLDEST_DRIVERS.get(int(number.partition(".")[0]))
    needed = f"a driver for CUDA {number.partition('.')[0]}{f' ({driver} or later)' if driver else ''}"
    return (
        f"CUDA {number}, code for sm_{kernels.archs.replace(',', ', sm_')} and PTX for later ones; needs {needed}; "
        "auto takes Triton first but where measurements of the GPU say otherwise"
    )


@functools.cache
def unavailable():
    if kernels is None:
        return [missing]
    if device_type != "cuda":  # neither a GPU nor a driver is needed
        return []
    if torch.version.hip:
        return ["serves NVIDIA GPUs, and this PyTorch is AMD's (ROCm)"]
    runtime, driver = kernels.runtime_version(), kernels.driver_version()
    if not driver:
        return ["finds no NVIDIA driver"]
    if driver // 1000 < runtime // 1000:  # of one major version, older drivers run what newer compilers made
        return [f"needs a driver for CUDA {runtime // 1000}.0 or later, and this one serves up to {version(driver)}"]
    return [] if torch.cuda.is_available() else ["finds no GPU (torch.cuda.is_available() is false)"]


@functools.cache
def unfit(index):
    """Why a GPU cannot run the kernels."""
    major, minor = torch.cuda.get_device_capability(index)
    arch, name = major * 10 + minor, torch.cuda.get_device_name(index)
    if arch < OLDEST_ARCH:
        return [
            f"needs an architecture of sm_{OLDEST_ARCH} or later, and {name} is sm_{arch} (auto takes another backend)"
        ]
    if arch < int(kernels.archs.split(",")[0]):  # there is neither code nor PTX for it
        compiled = (
            f"is compiled for sm_{kernels.archs.replace(',', ', sm_')} and what is later, and {name} is sm_{arch}"
        )
        return [f"{compiled} (FASTLM_BUILD_CUDA=1 FASTLM_CUDA_ARCHS={arch} pip install builds it for that)"]
    return []


def refuses(operator, device, dtype, **features):
    reasons = list(unavailable())
    if reasons:
        return reasons
    # One launcher for batches of every kind; linear is the vendor's.
    if operator != "linear" and not hasattr(kernels, f"{operator.removesuffix('_varlen')}_forward"):
        reasons.append(f"has no {operator}")
    if device.type != device_type:
        reasons.append(f"serves CUDA tensors, not {device} (.to('cuda') moves them)")
    elif device.type == "cuda":
        reasons += unfit(torch.cuda.current_device() if device.index is None else device.index)
    if dtype not in DTYPES:
        reasons.append(f"computes in {', '.join(map(str, DTYPES))}, not {dtype}")
    return reasons + beyond(operator, features)


def queue(x):
    """(device, stream): where PyTorch launches kernels on x."""
    if not x.is_cuda:
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def rows(x):
    """x as the kernels take rows: contiguous of any rank, or a matrix with a contiguous last dimension."""
    return x if x is None or x.is_contiguous() else rows_of(x)


# linear: the vendor's GEMM


LINEAR_IS_PYTORCHS = True
linear_forward, linear_backward = native.linear_forward, native.linear_backward


# layernorm_residual


def layernorm_residual_forward(x, residual, weight, bias, seed, eps, dropout_p):
    y = new_like(x)
    summed = new_like(x if residual is None else residual, residual is not None or seed is not None)
    mean, rstd = new_of_rows(x)
    if x.numel():
        with on(x):
            device, stream = queue(x)
            kernels.layernorm_residual_forward(
                x=rows(x),
                residual=rows(residual),
                weight=vector(weight),
                bias=vector(bias),
                y=y,
                summed=summed,
                mean=mean,
                rstd=rstd,
                seed=seed,
                eps=eps,
                dropout_p=dropout_p,
                device=device,
                stream=stream,
            )
    return y, summed, mean, rstd


def layernorm_residual_backward(dy, dsummed, summed, weight, mean, rstd, seed, dropout_p, dtype, needed):
    width = weight.shape[0]
    dx, dresidual = new_like(summed, needed[0], dtype), new_like(summed, needed[1])
    dweight, dbias = new_like(weight, needed[2]), new_like(weight, needed[3])
    if summed.numel() == 0 or dy is None:
        dweight, dbias = (d if d is None else d.zero_() for d in (dweight, dbias))
    if summed.numel():
        # Without dy the gradients of weight and bias are zero, and the kernel computes none.
        computed_dweight, computed_dbias = (None if dy is None else d for d in (dweight, dbias))
        gradients = (computed_dweight is not None) + (computed_dbias is not None)
        shape = gradients, kernels.layernorm_residual_max_partials(), -(-width // 8) * 8
        partials = torch.empty(shape, dtype=torch.float32, device=summed.device) if gradients else None
        with on(summed):
            device, stream = queue(summed)
            kernels.layernorm_residual_backward(
                dy=rows(dy),
                dsummed=rows(dsummed),
                summed=rows(summed),
                weight=vector(weight),
                mean=mean,
                rstd=rstd,
                dx=dx,
                dresidual=dresidual,
                dweight=computed_dweight,
                dbias=computed_dbias,
                partials=partials,
                seed=seed,
                x_dtype=dtype,
                dropout_p=dropout_p,
                device=device,
                stream=stream,
            )
    return dx, dresidual, dweight, dbias


# gelu_mlp: the product before the GELU, and in the backward the one after it, are ours, with the GELU in them; the others are the vendor's


def both_sides(x, w1, b1, approximate, layout, keeps_hidden, keeps_activated):
    """What the GELU reads and what it gives, None where not kept."""
    shape = (*x.shape[:-1], w1.shape[layout != "linear"])
    hidden, activated = (x.new_empty(shape) if kept else None for kept in (keeps_hidden, keeps_activated))
    if x.numel():
        with on(x):
            device, stream = queue(x)
            kernels.gelu_mlp_forward(
                x=rows(x),
                w1=matrix_of(w1),
                b1=vector(b1),
                hidden=hidden,
                activated=activated,
                conv1d=layout != "linear",
                tanh=approximate == "tanh",
                tf32=precision(x) == "tf32",
                device=device,
                stream=stream,
            )
    return hidden, activated


@as_written
def gelu_mlp_forward(x, w1, b1, w2, b2, approximate, layout, recompute):
    hidden, activated = both_sides(x, w1, b1, approximate, layout, recompute < 2, True)
    return linear_forward(activated, w2, b2, layout), hidden, activated if recompute < 1 else None


@as_written
def gelu_mlp_backward(dy, x, w1, b1, w2, hidden, activated, approximate, layout, needed):
    if hidden is None:
        hidden, activated = both_sides(x, w1, b1, approximate, layout, True, needed[3])
    hidden = hidden.contiguous()  # as it was, unless a hook on saved tensors laid it out anew
    remake = activated is None and needed[3]
    dhidden = None
    if any(needed[:3]):
        dhidden, activated = torch.empty_like(hidden), torch.empty_like(hidden) if remake else activated
        if x.numel():
            with on(x):
                device, stream = queue(x)
                kernels.gelu_mlp_backward(
                    dy=rows(dy),
                    w2=matrix_of(w2),
                    hidden=hidden,
                    dhidden=dhidden,
                    activated=activated if remake else None,
                    conv1d=layout != "linear",
                    tanh=approximate == "tanh",
                    tf32=precision(x) == "tf32",
                    device=device,
                    stream=stream,
                )
    elif remake:
        activated = torch.nn.functional.gelu(hidden, approximate=approximate)
    _, dw2, db2 = linear_backward(dy, hidden if activated is None else activated, w2, layout, (False, *needed[3:]))
    dx, dw1, db1 = (None,) * 3 if dhidden is None else linear_backward(dhidden, x, w1, layout, needed[:3])
    return dx, dw1, db1, dw2, db2


# linear_cross_entropy: without gradients one product that keeps no logits


@as_written
def linear_cross_entropy_forward(x, weight, bias, target, row_scale, ignore_index, label_smoothing, needed):
    check_targets(target, weight.shape[0], ignore_index)  # looks at values only on a CPU: the kernels assert
    flat, targets = rows_of(x), target.reshape(-1)
    loss = x.new_empty(targets.shape, dtype=torch.float32)

    def turn(logits, targets, scale, losses, statistics, partials):
        with on(x):
            device, stream = queue(x)
            kernels.linear_cross_entropy_gradient(
                logits=logits,
                target=targets,
                row_scale=scale,
                loss=losses,
                statistics=statistics,
                dbias_partials=partials,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                device=device,
                stream=stream,
            )

    dx = dweight = dbias = None
    if any(needed):
        scale = row_scale.reshape(-1).contiguous()
        dx, dweight, dbias = losses_and_gradients(
            flat, weight, bias, targets, scale, loss, needed, LOGITS_BYTES, num_partials, turn
        )
    else:
        losses(flat, matrix_of(weight), vector(bias), targets, loss, ignore_index, label_smoothing)
    return loss.view(target.shape), dx if dx is None else dx.view(x.shape), dweight, dbias


def num_partials(rows):
    return kernels.linear_cross_entropy_num_partials(rows=rows)


def losses(x, weight, bias, targets, loss, ignore_index, label_smoothing):
    rows = x.shape[0]
    num_splits = kernels.linear_cross_entropy_num_splits(dtype=x.dtype, vocab=weight.shape[0])
    chunk = min(rows, max(1, LOGITS_BYTES // (num_splits * 3 * 4)))
    for begin in range(0, rows, max(1, chunk)):
        part, target, result = (t[begin : begin + chunk] for t in (x, targets, loss))
        count = part.shape[0]
        with on(x):
            device, stream = queue(x)
            kernels.linear_cross_entropy_forward(
                x=part,
                weight=weight,
                bias=bias,
                target=target,
                loss=result,
                partials=loss.new_empty(num_splits, count, 2),
                logit_sums=loss.new_empty(num_splits, count) if label_smoothing else None,
                target_logits=loss.new_empty(count),
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                tf32=precision(x) == "tf32",
                device=device,
                stream=stream,
            )


# attention, attention_varlen


MAX_DECODE_QUERIES = 16  # queries of all heads that share a key head: with so few one sequence does not fill a GPU
MIN_SPLIT_SIZE = 256  # keys
MAX_BLOCKS = 1024  # fill any GPU
MAX_SPLITS = 128


def splits_of(batch, num_kv_heads, key_len):
    """(keys of a split, number of splits) of split-K, from the sizes alone."""
    wanted = max(1, min(MAX_BLOCKS // max(1, batch * num_kv_heads), MAX_SPLITS, -(-key_len // MIN_SPLIT_SIZE)))
    split_size = -(-key_len // (wanted * MIN_SPLIT_SIZE)) * MIN_SPLIT_SIZE
    return split_size, -(-key_len // split_size)


def launch_attention(query, key, value, out, lse, call):
    batch, heads, num_kv_heads, query_len, key_len, head_dim = call.sizes
    lower, upper = call.band
    queries = heads // num_kv_heads * query_len
    if call.cu_seqlens_q is not None or queries > MAX_DECODE_QUERIES or key_len <= MIN_SPLIT_SIZE:
        with on(query):
            device, stream = queue(query)
            kernels.attention_forward(
                query=query,
                key=key,
                value=value,
                out=out,
                lse=lse,
                mask=call.mask,
                key_padding=call.key_padding,
                query_starts=call.cu_seqlens_q,
                key_starts=call.cu_seqlens_k,
                seed=call.seed,
                scale=call.scale,
                lower=lower,
                upper=upper,
                dropout_p=call.dropout_p,
                tf32=precision(query) == "tf32",
                device=device,
                stream=stream,
            )
        return
    split_size, num_splits = splits_of(batch, num_kv_heads, key_len)
    partial_out = query.new_empty((batch, heads, query_len, num_splits, head_dim), dtype=torch.float32)
    partial_max, partial_sum = partial_out.new_empty((2, batch, heads, query_len, num_splits))
    with on(query):
        device, stream = queue(query)
        kernels.attention_decode(
            query=query,
            key=key,
            value=value,
            out=out,
            lse=lse,
            mask=call.mask,
            key_padding=call.key_padding,
            query_starts=None,
            key_starts=None,
            seed=call.seed,
            scale=call.scale,
            lower=lower,
            upper=upper,
            dropout_p=call.dropout_p,
            tf32=precision(query) == "tf32",
            partial_out=partial_out,
            partial_max=partial_max,
            partial_sum=partial_sum,
            split_size=split_size,
            device=device,
            stream=stream,
        )


def launch_gradients(dout, dlse, query, key, value, out, lse, dquery, dkey, dvalue, dmask, exact, call):
    lower, upper = call.band
    with on(query):
        device, stream = queue(query)
        kernels.attention_backward(
            query=query,
            key=key,
            value=value,
            out=out,
            lse=lse,
            mask=call.mask,
            key_padding=call.key_padding,
            query_starts=call.cu_seqlens_q,
            key_starts=call.cu_seqlens_k,
            seed=call.seed,
            scale=call.scale,
            lower=lower,
            upper=upper,
            dropout_p=call.dropout_p,
            tf32=precision(query) == "tf32",
            dout=dout,
            dlse=dlse,
            delta=torch.empty_like(lse),
            dquery=dquery,
            dkey=dkey,
            dvalue=dvalue,
            dmask=dmask,
            exact=exact,
            device=device,
            stream=stream,
        )


attention_forward, attention_backward, attention_varlen_forward, attention_varlen_backward = attention_operators(
    launch_attention, launch_gradients, dense_last
)
