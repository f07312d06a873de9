"""The Triton kernels, for NVIDIA and AMD GPUs. Under TRITON_INTERPRET=1 they run on CPU tensors, which is how they are tested where there is no GPU."""

import functools
import importlib
import importlib.util
import os
import pathlib
import types

import torch

import fastlm
from fastlm.backends import torch as native
from fastlm.backends.gpu import (
    DTYPES,
    attention_operators,
    beyond,
    by_layout,
    dropout,
    losses_and_gradients,
    new_like,
    new_of_rows,
    on,
    precision,
    processors,
    vector,
)
from fastlm.backends.layout import dense_last, rows_if, rows_of
from fastlm.backends.reference import as_written, check_targets

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OLDEST = (
    3,
    6,
)  # what PyTorch 2.10 brings; 3.5 fails to compile the gradients of packed attention (its asynchronous copies of less than 4 bytes)
OPERATORS = ("attention", "attention_varlen", "layernorm_residual", "gelu_mlp", "linear", "linear_cross_entropy")
WIDEST = 16384  # LayerNorm holds a row in registers
LOGITS_BYTES = 64 << 20  # of one chunk
LEAST_SHARED = 64 << 10  # bytes of a program's shared memory: no tile of the tables is made for less


def checkout() -> None:
    """In a checkout that is not installed the kernels lie beside the package, where fastlm.kernels must find them."""
    folder = pathlib.Path(__file__).parents[2]
    if (
        importlib.util.find_spec("fastlm.kernels") is None
        and (folder / "kernels").exists()
        and (folder / "csrc").exists()
    ):
        fastlm.__path__.append(str(folder))


checkout()


@functools.cache
def missing() -> str:
    """Why there is no usable Triton, or ""."""
    try:
        import triton
    except ImportError as why:
        return f"needs Triton, which cannot be imported ({why}); PyTorch for CUDA or ROCm brings it, else: pip install triton"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return (
            f"needs Triton {'.'.join(map(str, OLDEST))} or later, not {triton.__version__}; a newer PyTorch brings it"
        )
    return ""


MODULES = (
    "attention",
    "attention_backward",
    "attention_decode",
    "gelu_mlp",
    "layernorm_residual",
    "linear_cross_entropy",
)


@functools.cache
def modules():
    """The modules of fastlm.kernels, imported when they are first needed: they import Triton."""
    return [importlib.import_module(f"fastlm.kernels.{name}") for name in MODULES]


@functools.cache
def kernels():
    return types.SimpleNamespace(**dict(zip(MODULES, modules(), strict=True)))


def unavailable():
    if missing():
        return [missing()]
    return [] if INTERPRETED or torch.cuda.is_available() else ["finds no GPU (torch.cuda.is_available() is false)"]


@functools.cache
def architecture(index: int | None) -> str:
    """sm_80, gfx942, … of a GPU; "interpreter" for None, the CPU."""
    if index is None:
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


@functools.cache
def unfit(index: int) -> list[str]:
    """Why a GPU cannot run the kernels."""
    reasons, name = [], torch.cuda.get_device_name(index)
    if not torch.version.hip and torch.cuda.get_device_capability(index) < (8, 0):
        reasons.append(
            f"needs an architecture of sm_80 or later, and {name} is {architecture(index)} (auto takes another backend)"
        )
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or getattr(
        properties, "shared_memory_per_block", LEAST_SHARED
    )
    if shared < LEAST_SHARED:
        reasons.append(
            f"needs {LEAST_SHARED >> 10} KiB of shared memory, and {name} has {shared >> 10} (auto takes another backend)"
        )
    return reasons


def refuses(operator, device, dtype, **features):
    reasons = []
    if operator not in OPERATORS:
        reasons.append(f"has no {operator}")
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        interpreting = (
            f"serves CPU tensors under TRITON_INTERPRET=1, not {device} (without that variable it serves GPUs)"
        )
        reasons.append(
            interpreting if INTERPRETED else f"serves CUDA and ROCm tensors, not {device} (.to('cuda') moves them)"
        )
    elif device.type == "cuda":
        reasons += unfit(torch.cuda.current_device() if device.index is None else device.index)
    if dtype not in DTYPES:
        reasons.append(f"computes in {', '.join(map(str, DTYPES))}, not {dtype}")
    reasons += beyond(operator, features)
    if operator == "layernorm_residual" and features["width"] > WIDEST:
        reasons.append(f"holds a row in registers: width up to {WIDEST}, not {features['width']}")
    return reasons


# linear: the vendor's GEMM, which nothing here would improve on


LINEAR_IS_PYTORCHS = True
linear_forward, linear_backward = native.linear_forward, native.linear_backward


# gelu_mlp


@as_written
def gelu_mlp_forward(x, w1, b1, w2, b2, approximate, layout, recompute):
    out = layout != "linear"
    tanh, device = approximate == "tanh", x.device.index
    tile = kernels().gelu_mlp.fused_tile(architecture(device), x.dtype.itemsize)
    shape = (*x.shape[:-1], w1.shape[out])
    keeps_hidden = recompute < 2
    if x.numel() == 0:
        hidden, activated = x.new_empty(shape), x.new_empty(shape)
    elif tile is not None:
        hidden, activated = x.new_empty(shape) if keeps_hidden else None, x.new_empty(shape)
        with on(x):
            kernels().gelu_mlp.gelu_mlp_forward(
                rows_of(x),
                w1,
                by_layout(w1, layout),
                vector(b1),
                hidden,
                activated,
                shape[-1],
                tanh,
                precision(x),
                tile,
                device,
                processors(device),
            )
    else:
        hidden = linear_forward(x, w1, None, layout)
        activated = torch.empty_like(hidden) if keeps_hidden else hidden
        with on(x):
            kernels().gelu_mlp.gelu_mlp_activate(hidden, vector(b1), activated, tanh, device)
    return (
        linear_forward(activated, w2, b2, layout),
        hidden if keeps_hidden else None,
        activated if recompute < 1 else None,
    )


@as_written
def gelu_mlp_backward(dy, x, w1, b1, w2, hidden, activated, approximate, layout, needed):
    tanh, device = approximate == "tanh", x.device.index
    tile = kernels().gelu_mlp.fused_tile(architecture(device), x.dtype.itemsize)
    if hidden is None:
        hidden = linear_forward(x, w1, b1, layout)
    hidden = hidden.contiguous()  # as it was, unless a hook on saved tensors laid it out anew
    remake = activated is None and needed[3]
    activated = torch.empty_like(hidden) if remake else activated
    made = activated if remake else None
    dhidden = None
    if x.numel() == 0:
        dhidden = hidden
    elif any(needed[:3]) and tile is not None:
        dhidden = torch.empty_like(hidden)
        with on(x):
            kernels().gelu_mlp.gelu_mlp_backward(
                rows_of(dy),
                w2,
                by_layout(w2, layout)[::-1],
                hidden,
                dhidden,
                made,
                hidden.shape[-1],
                tanh,
                precision(x),
                tile,
                device,
                processors(device),
            )
    elif any(needed[:3]):
        dhidden = linear_backward(dy, hidden, w2, layout, (True, False, False))[0]
        with on(x):
            kernels().gelu_mlp.gelu_mlp_slope(dhidden, hidden, made, tanh, device)
    elif remake:
        with on(x):
            kernels().gelu_mlp.gelu_mlp_activate(hidden, None, activated, tanh, device)
    _, dw2, db2 = linear_backward(dy, hidden if activated is None else activated, w2, layout, (False, *needed[3:]))
    dx, dw1, db1 = (None,) * 3 if dhidden is None else linear_backward(dhidden, x, w1, layout, needed[:3])
    return dx, dw1, db1, dw2, db2


# linear_cross_entropy


@as_written
def linear_cross_entropy_forward(x, weight, bias, target, row_scale, ignore_index, label_smoothing, needed):
    check_targets(target, weight.shape[0], ignore_index)  # looks at values only on a CPU: the kernel asserts
    loss = x.new_empty(target.numel(), dtype=torch.float32)
    row_scale = row_scale.reshape(-1).contiguous() if any(needed) else None

    def turn(logits, targets, scale, losses, statistics, shares):
        with on(x):
            kernels().linear_cross_entropy.linear_cross_entropy(
                logits, targets, scale, losses, statistics, shares, ignore_index, label_smoothing, x.device.index
            )

    shares = kernels().linear_cross_entropy.parts
    dx, dweight, dbias = losses_and_gradients(
        rows_of(x), weight, bias, target.reshape(-1), row_scale, loss, needed, LOGITS_BYTES, shares, turn
    )
    return loss.view(target.shape), dx if dx is None else dx.view(x.shape), dweight, dbias


# layernorm_residual


def layernorm_residual_forward(x, residual, weight, bias, seed, eps, dropout_p):
    stream = x if residual is None else residual
    y = new_like(x)
    summed = new_like(stream, residual is not None or seed is not None)
    mean, rstd = new_of_rows(x)
    if x.numel():
        width = x.shape[-1]
        (flat, step), (residual, residual_step) = rows_if(x), rows_if(residual)
        with on(x):
            kernels().layernorm_residual.layernorm_residual_forward(
                flat,
                step,
                residual,
                residual_step,
                vector(weight),
                vector(bias),
                y,
                summed,
                mean,
                rstd,
                seed,
                x.numel() // width,
                width,
                eps,
                *dropout(dropout_p),
                x.device.index,
            )
    return y, summed, mean, rstd


def layernorm_residual_backward(dy, dsummed, summed, weight, mean, rstd, seed, dropout_p, dtype, needed):
    width = weight.shape[0]
    dx, dresidual = new_like(summed, needed[0], dtype), new_like(summed, needed[1])
    dweight, dbias = new_like(weight, needed[2]), new_like(weight, needed[3])
    if summed.numel() == 0 or dy is None:
        dweight, dbias = (d if d is None else d.zero_() for d in (dweight, dbias))
    if summed.numel():
        rows, device = summed.numel() // width, summed.device.index
        inputs = *rows_if(dy), *rows_if(dsummed), *rows_if(summed)
        wanted = dy is not None and (needed[2] or needed[3])
        programs, steps = kernels().layernorm_residual.cut(rows, width, seed is not None)
        shares = summed.new_empty((needed[2] + needed[3], programs, width), dtype=torch.float32) if wanted else None
        with on(summed):
            kernels().layernorm_residual.layernorm_residual_backward(
                *inputs,
                vector(weight),
                mean,
                rstd,
                dx,
                dresidual,
                shares[0] if wanted and needed[2] else None,
                shares[-1] if wanted and needed[3] else None,
                seed,
                rows,
                width,
                programs,
                steps,
                *dropout(dropout_p),
                device,
            )
            if wanted:
                kernels().layernorm_residual.layernorm_residual_fold(shares, dweight, dbias, programs, width, device)
    return dx, dresidual, dweight, dbias


# attention, attention_varlen


def near(x):
    """x with a contiguous last dimension and rows near enough for 32-bit offsets within a tile of them."""
    return dense_last(x) if x.stride(2) < 2**23 else x.contiguous()


def launch_attention(query, key, value, out, lse, call):
    _, heads, key_heads, query_len, key_len, _ = call.sizes
    settings = (
        call.sizes,
        call.band,
        call.scale,
        *dropout(call.dropout_p),
        precision(query),
        architecture(query.device.index),
        query.device.index,
    )
    with on(query):
        if call.cu_seqlens_q is None and kernels().attention_decode.serves(heads, key_heads, query_len, key_len):
            kernels().attention_decode.attention_decode(
                query,
                key,
                value,
                out,
                lse,
                call.mask,
                call.key_padding,
                call.seed,
                *settings,
                lambda shape: torch.empty(shape, dtype=torch.float32, device=query.device),
            )
        else:
            kernels().attention.attention_forward(
                query,
                key,
                value,
                out,
                lse,
                call.mask,
                call.key_padding,
                call.cu_seqlens_q,
                call.cu_seqlens_k,
                call.seed,
                *settings,
            )


def launch_gradients(dout, dlse, query, key, value, out, lse, dquery, dkey, dvalue, dmask, exact, call):
    with on(query):
        kernels().attention_backward.attention_backward(
            dout,
            dlse,
            query,
            key,
            value,
            call.mask,
            call.key_padding,
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            call.seed,
            out,
            lse,
            dquery,
            dkey,
            dvalue,
            dmask,
            call.sizes,
            call.band,
            call.scale,
            *dropout(call.dropout_p),
            precision(query),
            exact,
            architecture(query.device.index),
            query.device.index,
            torch.empty_like(lse),
        )


attention_forward, attention_backward, attention_varlen_forward, attention_varlen_backward = attention_operators(
    launch_attention, launch_gradients, near
)
