"""The CUDA C++ kernels: tensors become addresses, sizes and strides here, and nowhere else."""

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
    by_layout,
    dropout,
    losses_and_gradients,
    new_like,
    new_of_rows,
    on,
    precision,
    vector,
)
from fastlm.backends.layout import dense_last, matrix_of, rows_if, rows_of
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
LAUNCHED_AS = {}


def use_module(module, accepts="cuda"):
    """Launch the kernels of `module`, which has the functions of fastlm._cuda and accepts tensors of the device type `accepts`."""
    global kernels, device_type
    kernels, device_type = module, accepts
    LAUNCHED_AS.update((dtype, getattr(module.dtype, str(dtype).removeprefix("torch."))) for dtype in DTYPES)
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


def address(tensor, writable=False):
    """The address of a tensor that a launch reads, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def written(tensor):
    """The address of a tensor that a launch writes, 0 for none."""
    return address(tensor, writable=True)


def queue(x):
    """(device, stream): where PyTorch launches kernels on x."""
    if not x.is_cuda:
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def launch(kernel, x, *arguments):
    """kernel(queue, *arguments) while x's device is PyTorch's current one: the driver has one for each thread, and a launch elsewhere would leave it moved."""
    with on(x):
        kernel(queue(x), *arguments)


if kernels is not None:
    use_module(kernels)


# linear: the vendor's GEMM


LINEAR_IS_PYTORCHS = True
linear_forward, linear_backward = native.linear_forward, native.linear_backward


# layernorm_residual


def layernorm_residual_forward(x, residual, weight, bias, seed, eps, dropout_p):
    stream = x if residual is None else residual
    y = new_like(x)
    summed = new_like(stream, residual is not None or seed is not None)
    mean, rstd = new_of_rows(x)
    if x.numel():
        (rows, step), (residual, residual_step), weight, bias, width = (
            rows_if(x),
            rows_if(residual),
            vector(weight),
            vector(bias),
            x.shape[-1],
        )
        launch(
            kernels.layernorm_residual_forward,
            x,
            LAUNCHED_AS[x.dtype],
            LAUNCHED_AS[stream.dtype],
            LAUNCHED_AS[weight.dtype],
            address(rows),
            step,
            address(residual),
            residual_step,
            address(weight),
            address(bias),
            written(y),
            written(summed),
            written(mean),
            written(rstd),
            address(seed),
            x.numel() // width,
            width,
            eps,
            dropout_p,
        )
    return y, summed, mean, rstd


def layernorm_residual_backward(dy, dsummed, summed, weight, mean, rstd, seed, dropout_p, dtype, needed):
    width = weight.shape[0]
    dx, dresidual = new_like(summed, needed[0], dtype), new_like(summed, needed[1])
    dweight, dbias = new_like(weight, needed[2]), new_like(weight, needed[3])
    if summed.numel() == 0 or dy is None:
        dweight, dbias = (d if d is None else d.zero_() for d in (dweight, dbias))
    if summed.numel():
        (flat, step), (dy, dy_step), (dsummed, dsummed_step), weight = (
            rows_if(summed),
            rows_if(dy),
            rows_if(dsummed),
            vector(weight),
        )
        sums = [d if dy is not None else None for d in (dweight, dbias)]
        wanted = sum(d is not None for d in sums)
        shape = wanted, kernels.layernorm_residual_most_shares(), -(-width // 8) * 8
        shares = torch.empty(shape, dtype=torch.float32, device=summed.device) if wanted else None
        launch(
            kernels.layernorm_residual_backward,
            summed,
            LAUNCHED_AS[dtype],
            LAUNCHED_AS[summed.dtype],
            LAUNCHED_AS[weight.dtype],
            address(dy),
            dy_step,
            address(dsummed),
            dsummed_step,
            address(flat),
            step,
            address(weight),
            address(mean),
            address(rstd),
            written(dx),
            written(dresidual),
            *map(written, sums),
            written(shares),
            address(seed),
            summed.numel() // width,
            width,
            dropout_p,
        )
    return dx, dresidual, dweight, dbias


# gelu_mlp: the product before the GELU, and in the backward the one after it, are ours, with the GELU in them; the others are the vendor's


def both_sides(x, w1, b1, approximate, layout, keeps_hidden, keeps_activated):
    """What the GELU reads and what it gives, None where not kept."""
    shape = (*x.shape[:-1], w1.shape[layout != "linear"])
    hidden, activated = (x.new_empty(shape) if kept else None for kept in (keeps_hidden, keeps_activated))
    if x.numel():
        flat, w1, b1 = rows_of(x), matrix_of(w1), vector(b1)
        launch(
            kernels.gelu_mlp_forward,
            x,
            LAUNCHED_AS[x.dtype],
            address(flat),
            flat.stride(0),
            address(w1),
            *by_layout(w1, layout),
            address(b1),
            written(hidden),
            written(activated),
            *flat.shape,
            shape[-1],
            approximate == "tanh",
            precision(x) == "tf32",
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
            dflat, w = rows_of(dy), matrix_of(w2)
            launch(
                kernels.gelu_mlp_backward,
                x,
                LAUNCHED_AS[x.dtype],
                address(dflat),
                dflat.stride(0),
                address(w),
                *by_layout(w, layout)[::-1],
                address(hidden),
                written(dhidden),
                written(activated if remake else None),
                *dflat.shape,
                hidden.shape[-1],
                approximate == "tanh",
                precision(x) == "tf32",
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
    dtype = LAUNCHED_AS[x.dtype]

    def turn(logits, targets, scale, losses, statistics, shares):
        launch(
            kernels.linear_cross_entropy_gradient,
            x,
            dtype,
            written(logits),
            logits.stride(0),
            address(targets),
            targets.stride(0),
            address(scale),
            written(losses),
            written(statistics),
            written(shares),
            *logits.shape,
            ignore_index,
            label_smoothing,
        )

    dx = dweight = dbias = None
    if any(needed):
        scale, shares = row_scale.reshape(-1).contiguous(), kernels.linear_cross_entropy_shares
        dx, dweight, dbias = losses_and_gradients(
            flat, weight, bias, targets, scale, loss, needed, LOGITS_BYTES, shares, turn
        )
    else:
        losses(flat, matrix_of(weight), vector(bias), targets, loss, ignore_index, label_smoothing)
    return loss.view(target.shape), dx if dx is None else dx.view(x.shape), dweight, dbias


def losses(x, weight, bias, targets, loss, ignore_index, label_smoothing):
    (rows, width), vocab, dtype = x.shape, weight.shape[0], LAUNCHED_AS[x.dtype]
    parts = kernels.linear_cross_entropy_parts(dtype, vocab)
    chunk = min(rows, max(1, LOGITS_BYTES // (parts * 3 * 4)))
    for begin in range(0, rows, max(1, chunk)):
        part, target, result = (t[begin : begin + chunk] for t in (x, targets, loss))
        count = part.shape[0]
        tops_and_norms, at_target = loss.new_empty(parts, count, 2), loss.new_empty(count)
        sums = loss.new_empty(parts, count) if label_smoothing else None
        launch(
            kernels.linear_cross_entropy_forward,
            x,
            dtype,
            address(part),
            part.stride(0),
            address(weight),
            *by_layout(weight, "linear"),
            address(bias),
            address(target),
            target.stride(0),
            written(result),
            written(tops_and_norms),
            written(sums),
            written(at_target),
            count,
            width,
            vocab,
            ignore_index,
            label_smoothing,
            precision(x) == "tf32",
        )


# attention, attention_varlen


FEW = 16  # queries of all heads that share a key head: so many make one sequence too little for a GPU, unless its keys are cut
SHORTEST = 256  # keys of one stretch
BLOCKS = 1024  # that fill any GPU
MOST_STRETCHES = 128


def strides(x, rank):
    """As if expanded: 0 where a size is 1; all 0 for None."""
    if x is None:
        return (0,) * rank
    shape, own = x.shape, x.stride()
    return tuple([0 if shape[i] == 1 else own[i] for i in range(rank)]) if 1 in shape else own[:rank]


def mask_type(mask, dtype):
    if mask is None:
        return 0
    return 1 if mask.dtype == torch.bool else 2 if mask.dtype == dtype else 3


def attention_inputs(query, key, value, lse, lse_written, call):
    """What forward and backward share. It holds addresses: its tensors must live until the launch."""
    heads, tokens = lse.shape[1:]
    cu_query, cu_key = call.cu_seqlens_q, call.cu_seqlens_k
    return kernels.attention_inputs(
        LAUNCHED_AS[query.dtype],
        address(query),
        strides(query, 3),
        address(key),
        strides(key, 3),
        address(value),
        strides(value, 3),
        address(lse, lse_written),
        (heads * tokens, tokens),
        address(call.mask),
        mask_type(call.mask, query.dtype),
        strides(call.mask, 4),
        address(call.key_padding),
        strides(call.key_padding, 2),
        (address(cu_query), cu_query is not None and cu_query.dtype == torch.int64),
        (address(cu_key), cu_key is not None and cu_key.dtype == torch.int64),
        call.sizes,
        call.band,
        call.scale,
        address(call.seed),
        *dropout(call.dropout_p),
        precision(query) == "tf32",
    )


def stretches_of(batch, key_heads, key_len):
    """(keys of one stretch, how many), by sizes alone."""
    wanted = max(1, min(BLOCKS // max(1, batch * key_heads), MOST_STRETCHES, -(-key_len // SHORTEST)))
    stretch = -(-key_len // (wanted * SHORTEST)) * SHORTEST
    return stretch, -(-key_len // stretch)


def launch_attention(query, key, value, out, lse, call):
    batch, heads, key_heads, query_len, key_len, head_dim = call.sizes
    inputs = attention_inputs(query, key, value, lse, True, call)
    if call.cu_seqlens_q is None and heads // key_heads * query_len <= FEW and key_len > SHORTEST:
        stretch, stretches = stretches_of(batch, key_heads, key_len)
        part = query.new_empty((batch, heads, query_len, stretches, head_dim), dtype=torch.float32)
        top, norm = part.new_empty((2, batch, heads, query_len, stretches))
        launch(
            kernels.attention_decode,
            query,
            inputs,
            written(out),
            strides(out, 3),
            written(part),
            written(top),
            written(norm),
            stretch,
            stretches,
        )
    else:
        launch(kernels.attention_forward, query, inputs, written(out), strides(out, 3))


def launch_gradients(dout, dlse, query, key, value, out, lse, dquery, dkey, dvalue, dmask, exact, call):
    inputs, delta, mask = attention_inputs(query, key, value, lse, False, call), torch.empty_like(lse), call.mask
    launch(
        kernels.attention_backward,
        query,
        inputs,
        address(out),
        strides(out, 3),
        address(dout),
        strides(dout, 3),
        address(dlse),
        written(delta),
        written(dquery),
        strides(dquery, 3),
        written(dkey),
        strides(dkey, 3),
        written(dvalue),
        strides(dvalue, 3),
        written(dmask),
        (1, 1) if mask is None else tuple(mask.shape[:2]),
        mask is not None and mask.shape[2] == 1,
        exact,
    )


attention_forward, attention_backward, attention_varlen_forward, attention_varlen_backward = attention_operators(
    launch_attention, launch_gradients, dense_last
)
