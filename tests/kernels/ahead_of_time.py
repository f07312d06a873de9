"""Compiles the Triton kernels ahead of time: ahead_of_time.py OUT.json TARGET… [--only WORD…] [--configurations …]

The launches are those of the backend: it is called with CPU tensors as if they were on the target, and each launch is
compiled instead of run. This needs a process of its own, because under TRITON_INTERPRET=1 nothing is compiled. OUT.json
gets one entry per kernel, configuration and target. --configurations is all, none or K/N (see chosen()).
"""

import argparse
import json
import multiprocessing
import re
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

import fastlm.backends.triton  # noqa: F401 (finds fastlm.kernels in a checkout)
from fastlm.kernels import configs
from tests.kernels import machine_code
from tests.kernels.support import backward, forward, kernel_modules, set_architecture

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
TARGETS = {
    **{f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
SHARED = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
    "gfx1100": 64,
}  # KiB of one program
OTHERS = "window", "bool padding", "dropout", "causal softcap", "causal, shared keys"
launches: list[tuple] = []
work: list[tuple] = []  # (target, case, launch) to compile


def record(kernel, programs, arguments, constants, warps, stages, device, debug=False):
    """Records a launch without its tensors: those of all configurations together do not fit into memory."""
    launches.append((source_of(kernel, arguments, constants), constants, warps, stages, debug))


def source_of(kernel, arguments, constants):
    """The specialisation of a launch: types, integers that are 1, and multiples of 16."""
    signature, constexprs, attributes = {}, {}, {}
    values = [*arguments, *constants]
    assert len(values) == len(kernel.params), kernel
    for parameter, value in zip(kernel.params, values, strict=True):
        at = (parameter.num,)
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        ):
            signature[parameter.name], constexprs[at] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[at] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "*" + TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[at] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def compiled(launch, name):
    source, _, warps, stages, debug = launch
    options = {
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
        **({"debug": True, "sanitize_overflow": False} if debug else {}),
    }
    return triton.compile(source, target=TARGETS[name], options=options)


def resources(binary, name, warps):
    """What the compiled code takes and does: see machine_code.py. spilled: bytes."""
    if name.startswith("gfx"):
        text = binary.asm["amdgcn"]
        return {
            "spilled": 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text).group(1)),
            "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1)),
            "matrix": sorted(set(re.findall(r"v_(mfma|wmma)_f32\w*?(?:bf16|f16|f32)", text))),
            "spills_in_loops": 0,
            "unfenced": 0,
            "repeated": 1.0,
        }
    spilled, registers = machine_code.usage(binary)
    return {
        "spilled": spilled,
        "registers": registers,
        "matrix": sorted(set(re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)", binary.asm["ptx"]))),
        "spills_in_loops": machine_code.spills_in_product_loops(binary) if spilled else 0,
        "unfenced": machine_code.unfenced_products(binary.asm["ptx"]),
        "repeated": machine_code.repeated_products(binary, warps),
    }


# The launches of each operator


def attention(dtype, head_dim, masked="", lengths=(512, 512), num_kv_heads=2, with_backward=True):
    batch, heads = 2, 4
    query, key, value = (
        torch.empty(batch, n, h, head_dim, dtype=dtype).transpose(1, 2)
        for n, h in zip((*lengths, lengths[1]), (heads, num_kv_heads, num_kv_heads), strict=True)
    )
    if "shared keys" in masked:  # no strides for bulk copies
        key, value = (x[:1].expand(batch, -1, -1, -1) for x in (key, value))
    mask = padding = seed = None
    lower, upper = -(2**62), lengths[1] - lengths[0]
    if "window" in masked:
        lower = -64
    if "bool" in masked:
        mask = torch.empty(1, 1, *lengths, dtype=torch.bool)
    if "bias" in masked:
        mask = torch.empty(1, heads, *lengths, dtype=dtype)
    if "padding" in masked:
        padding = torch.empty(batch, lengths[1], dtype=torch.bool)
    if "dropout" in masked:
        seed = torch.zeros((), dtype=torch.int64)
    softcap = 50.0 if "softcap" in masked else 0.0
    settings = 0.125, softcap, lower, upper, 0.1 if seed is not None else 0.0, True
    inputs = query, key, value, mask, padding, None, None, seed
    out, lse = forward("attention", "triton", *inputs, *settings, "bias" in masked)
    if with_backward:
        backward("attention", "triton", out, None, *inputs, out, lse, *settings, (True, True, True, "bias" in masked))


def packed(dtype, head_dim):
    query, key, value = (torch.empty(512, n, head_dim, dtype=dtype) for n in (4, 2, 2))
    starts = torch.tensor([0, 100, 512], dtype=torch.int32)
    inputs, settings = (query, key, value, None, None, starts, starts, None), (0.125, 0.0, -64, 0, 0.0, True)
    out, lse = forward("attention", "triton", *inputs, *settings, False)
    backward("attention", "triton", out, None, *inputs, out, lse, *settings, (True, True, True, False))


def layernorm(dtype, width, stream=None, dropout=False):
    x, w = torch.empty(4096, width, dtype=dtype), torch.empty(width, dtype=torch.float32)
    residual = None if stream is None else torch.empty(4096, width, dtype=stream)
    seed = torch.zeros((), dtype=torch.int64) if dropout else None
    settings = seed, 1e-5, 0.1 if dropout else 0.0
    y, summed, mean, rstd = forward("layernorm_residual", "triton", x, residual, w, w, *settings)
    summed = x if summed is None else summed
    shared = not dropout and summed.dtype == dtype
    dsummed, needed = None if residual is None else summed, (True, not shared, True, True)
    saved = summed, w, mean, rstd, seed, 1e-5, 0.1
    backward("layernorm_residual", "triton", y, dsummed, *saved, dtype, needed)


def rms_norm(dtype, width, dropout=False):
    """Of a residual sum, or without dropout of queries that are a view of a projection."""
    shape = (4096, width) if dropout else (2, 64, 12, width)
    x, w = torch.empty(shape, dtype=dtype), torch.empty(width, dtype=torch.float32)
    residual = torch.empty(4096, width, dtype=torch.float32) if dropout else None
    seed = torch.zeros((), dtype=torch.int64) if dropout else None
    x = x if dropout else x.transpose(1, 2)
    settings = 1e-6, 0.1 if dropout else 0.0, not dropout
    y, summed, rstd = forward("rms_norm_residual", "triton", x, residual, w, seed, *settings)
    saved = x if summed is None else summed, w, rstd, seed, *settings, dtype
    backward("rms_norm_residual", "triton", y, summed, *saved, (True, dropout, True))


def rotary(dtype, head_dim, rotary_dim):
    query, key = (torch.empty(2, 512, n, head_dim, dtype=dtype).transpose(1, 2) for n in (12, 4))
    cos, sin = (torch.empty(1, 512, rotary_dim) for _ in range(2))
    dquery, _ = forward("rotary", "triton", query, key, cos, sin)
    backward("rotary", "triton", dquery, None, cos, sin, (True, False))


def gelu_mlp(dtype, recompute):
    x, w, b = torch.empty(64, 768, dtype=dtype), torch.empty(3072, 768, dtype=dtype), torch.empty(3072, dtype=dtype)
    settings, inputs = ("tanh" if recompute else "none", "linear"), (x, w, b, w.t(), x[0])
    y, hidden, activated = forward("gelu_mlp", "triton", *inputs, *settings, recompute)
    hidden = torch.empty(64, 3072, dtype=dtype)
    backward("gelu_mlp", "triton", y, *inputs, hidden, activated, *settings, False, (True,) * 5)


def glu_mlp(dtype, activation, recompute):
    x, w, b = torch.empty(64, 576, dtype=dtype), torch.empty(3072, 576, dtype=dtype), torch.empty(1536, dtype=dtype)
    inputs = x, *w.chunk(2), w[:1536].t(), b, b, x[0]
    y, gate, up, activated = forward("glu_mlp", "triton", *inputs, activation, recompute)
    gate, up = torch.empty(2, 64, 1536, dtype=dtype)
    backward("glu_mlp", "triton", y, *inputs, gate, up, activated, activation, False, (True,) * 7)


def cross_entropy(dtype, with_bias, softcap):
    x, w = torch.zeros(64, 16, dtype=dtype), torch.zeros(30528, 16, dtype=dtype)
    target, scale = torch.zeros(64, dtype=torch.int64), torch.ones(64)
    inputs = x, w, w[:, 0].contiguous() if with_bias else None, target, scale
    needed = True, True, with_bias
    forward("linear_cross_entropy", "triton", *inputs, -100, 0.1 * with_bias, 1.0, softcap, False, needed)


def log_prob(dtype, with_bias, softcap):
    """Both gradients, or without a bias that of log_prob alone."""
    x, w = torch.zeros(64, 16, dtype=dtype), torch.zeros(30528, 16, dtype=dtype)
    inputs = x, w, w[:, 0].contiguous() if with_bias else None, torch.zeros(64, dtype=torch.int64)
    log_prob, *saved = forward("linear_log_prob", "triton", *inputs, -100, 0.7, softcap)
    upstream = log_prob, log_prob if with_bias else None
    backward(
        "linear_log_prob", "triton", *upstream, *inputs, *saved, -100, 0.7, softcap, False, (True, True, with_bias)
    )


def cases(quick):
    """(title, call). The quick run leaves out sizes and dtypes only."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32)[: 1 if quick else 3]:
        short = str(dtype).removeprefix("torch.")
        for head_dim in (64,) if quick else (64, 128, 80) if dtype == torch.float16 else (64, 128, 80, 256):
            yield f"attention {short} {head_dim} causal", lambda d=dtype, h=head_dim: attention(d, h)
            yield (
                f"attention {short} {head_dim} decode",
                lambda d=dtype, h=head_dim: attention(d, h, "", (1, 2048), with_backward=False),
            )
        if dtype == torch.bfloat16:
            everything = "bias dropout", "bias dropout softcap"
            for masked in everything if quick else (*OTHERS, *everything):
                for head_dim in (64,) if quick else (64, 128, 256) if "bias" in masked else (64, 128):
                    yield (
                        f"attention {short} {head_dim} {masked}",
                        lambda d=dtype, h=head_dim, m=masked: attention(d, h, m),
                    )
            for head_dim in (64,) if quick else (64, 128, 256):
                yield (
                    f"attention {short} {head_dim} decode softcap",
                    lambda d=dtype, h=head_dim: attention(d, h, "softcap", (1, 2048), with_backward=False),
                )
            for head_dim in () if quick else (64, 128):
                yield f"attention {short} {head_dim} packed", lambda d=dtype, h=head_dim: packed(d, h)
        for head_dim in (64, 128, 256) if dtype == torch.float32 else ():
            yield (
                f"attention {short} {head_dim} bias dropout",
                lambda d=dtype, h=head_dim: attention(d, h, "bias dropout"),
            )
        for width in (768,) if quick else (768, 1600, 64, 16384):
            yield f"layernorm_residual {short} {width}", lambda d=dtype, w=width: layernorm(d, w, d)
        yield (
            f"layernorm_residual {short} 768 dropout float32 stream",
            lambda d=dtype: layernorm(d, 768, torch.float32, True),
        )
        for width in (128,) if quick else (128, 64, 80):
            yield f"rms_norm_residual {short} {width} heads", lambda d=dtype, w=width: rms_norm(d, w)
        for width in (960,) if quick else (960, 2048):
            yield (
                f"rms_norm_residual {short} {width} dropout float32 stream",
                lambda d=dtype, w=width: rms_norm(d, w, True),
            )
        yield f"rotary {short} 128 partial", lambda d=dtype: rotary(d, 128, 64)
        for head_dim in () if quick else (64, 96, 256):
            yield f"rotary {short} {head_dim}", lambda d=dtype, h=head_dim: rotary(d, h, h)
        for recompute in (0, 1):
            yield f"gelu_mlp {short} recompute {recompute}", lambda d=dtype, r=recompute: gelu_mlp(d, r)
        for activation, recompute in (("silu", 1),) if quick else (("silu", 1), ("gelu_tanh", 0), ("gelu", 2)):
            yield (
                f"glu_mlp {short} {activation} recompute {recompute}",
                lambda d=dtype, a=activation, r=recompute: glu_mlp(d, a, r),
            )
        for with_bias in (False, True):
            title = f"linear_cross_entropy {short}{' bias' * with_bias}"
            yield title, lambda d=dtype, b=with_bias: cross_entropy(d, b, 0.0)
            yield f"{title} softcap", lambda d=dtype, b=with_bias: cross_entropy(d, b, 30.0)
        for with_bias, softcap in ((False, 0.0), (True, 30.0)):
            title = f"linear_log_prob {short}{' bias softcap' * with_bias}"
            yield title, lambda d=dtype, b=with_bias, s=softcap: log_prob(d, b, s)


def chosen(targets, configurations="all", only=("",)):
    """(target, title) pairs to compile.

    These are the most common configurations, and of the others all, none, or every N-th from the K-th on ("K/N").
    """
    common = [title for title, _ in cases(True)]
    pairs = [(target, title) for target in targets for title in common]
    if configurations != "none":
        others = [(target, title) for target in targets for title, _ in cases(False) if title not in common]
        first, step = (0, 1) if configurations == "all" else map(int, configurations.split("/"))
        pairs += others[first::step]
    return [(target, title) for target, title in pairs if any(part in title for part in only)]


def kernels_of(title, target):
    """The kernels that a case launches on a target, in order."""
    operator = title.split()[0]
    if "decode" in title:
        return ["attention_decode_kernel", "attention_decode_combine_kernel"]
    if operator == "attention":
        mask = ["attention_backward_mask_kernel"] if "bias" in title else []
        each = [f"attention_{name}_kernel" for name in ("forward", "backward_query", "backward_key")]
        return [f"{kernel}{launch}" for kernel in each for launch in ("", " repair")] + mask
    if operator == "linear_log_prob":
        return ["linear_log_prob_forward_kernel", "linear_log_prob_backward_kernel"]
    if operator in ("layernorm_residual", "rms_norm_residual"):
        return [*(f"{operator}_{which}_kernel" for which in ("forward", "backward")), "residual_norm_reduce_kernel"]
    if operator == "rotary":
        return ["rotary_kernel"]
    if operator in ("gelu_mlp", "glu_mlp"):
        fused = configs.MLP.get((target, 4 if "float32" in title else 2))
        return [f"{operator}_{which}_kernel" for which in (("forward", "backward") if fused else ("activate", "slope"))]
    return ["linear_cross_entropy_kernel", *(["linear_cross_entropy_columns_kernel"] if "bias" in title else [])]


def name_of(launch):
    """The kernel's; the second launch of one that has two is called a repair."""
    kernel, constants = launch[0].fn, launch[1]
    return f"{kernel.__name__} repair" if kernel.arg_names[-1] == "REPAIR" and constants[-1] else kernel.__name__


def report(index):
    name, title, launch = work[index]
    entry = {
        "target": name,
        "case": title,
        "kernel": name_of(launch),
        "constants": list(map(str, launch[1])),
        "warps": launch[2],
        "stages": launch[3],
    }
    try:
        binary = compiled(launch, name)
    except Exception as failure:  # a failure of one test
        while failure.__cause__ is not None:
            failure = failure.__cause__
        return entry | {"error": f"{type(failure).__name__}: {' '.join(str(failure)[-300:].split())}"}
    divisions = re.findall(r"arith\.(?:div|rem)[us]i .*tensor<\S*i64>", binary.asm["ttir"])
    # Loads of a single element after the reductions, such as a logit: another thread may have overwritten it by then.
    _, _, reduced = binary.asm["ttir"].partition('"tt.reduce"')
    return (
        entry
        | {"wide_divisions": len(divisions), "read_late": len(re.findall(r"tt\.load .*: !tt\.ptr<b?f16>", reduced))}
        | {"shared": binary.metadata.shared, "limit": SHARED[name] << 10}
        | resources(binary, name, launch[2])
    )


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("out", type=Path)
    arguments.add_argument("targets", nargs="+")
    arguments.add_argument("--only", nargs="*", default=[""])
    arguments.add_argument("--kernel", default="")
    arguments.add_argument("--configurations", default="all")
    arguments.add_argument("--workers", type=int, default=2)
    arguments = arguments.parse_args()
    for module in kernel_modules():
        module.launch = record
    calls = dict(cases(False))
    for name, title in chosen(arguments.targets, arguments.configurations, arguments.only):
        set_architecture(setattr, name)
        launches.clear()
        calls[title]()
        work.extend((name, title, launch) for launch in launches if arguments.kernel in launch[0].fn.__name__)

    # Forked processes need no copies. Threads would not run in parallel, because Triton compiles with the GIL held.
    with multiprocessing.get_context("fork").Pool(arguments.workers) as pool:
        arguments.out.write_text(json.dumps(pool.map(report, range(len(work)), chunksize=1), indent=1))


if __name__ == "__main__":
    sys.exit(main())
