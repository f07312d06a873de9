"""attention by the Triton kernels (kernels/attention*.py)."""

import functools

import torch
from torch import Tensor

from fastlm.backends import triton
from fastlm.backends.contract import Implementation, Results
from fastlm.backends.gpu import dropout_arguments, on_device, precision
from fastlm.backends.triton import architecture
from fastlm.core.layout import contiguous_last
from fastlm.kernels import attention as kernels
from fastlm.kernels import attention_backward as backward_kernels
from fastlm.kernels import attention_decode as decode_kernels
from fastlm.kernels.plan import New, Plans, Workspace
from fastlm.ops.attention.gpu import Launch, make_implementation
from fastlm.ops.attention.gpu import refuses as too_large
from fastlm.ops.attention.spec import Backward, Forward, Sizes


def readable(x: Tensor) -> Tensor:
    """x with a contiguous last dimension and a token stride that keeps offsets within a tile below 2³¹."""
    return contiguous_last(x) if x.stride(2) < 2**23 else x.contiguous()


def attributes(query: Tensor, launch: Launch):
    device = query.device.index
    dropout = dropout_arguments(launch.dropout_p)
    return (
        launch.sizes,
        launch.band,
        launch.scale,
        launch.softcap,
        *dropout,
        precision(query),
        architecture(device),
        device,
    )


def launch_forward(query, key, value, out, lse, launch: Launch, new: New) -> None:
    _, heads, num_kv_heads, query_len, key_len, _ = launch.sizes
    tensors, masks = (query, key, value, out, lse), (launch.mask, launch.key_padding)
    settings = *attributes(query, launch), new
    with on_device(query):
        if launch.cu_seqlens_q is None and decode_kernels.serves(heads, num_kv_heads, query_len, key_len):
            decode_kernels.attention_decode(*tensors, *masks, launch.seed, *settings)
        else:
            starts = launch.cu_seqlens_q, launch.cu_seqlens_k
            kernels.attention_forward(*tensors, *masks, *starts, launch.seed, *settings)


def launch_backward(
    dout, dlse, query, key, value, out, lse, dquery, dkey, dvalue, dmask, exact: bool, launch: Launch, new: New
) -> None:
    with on_device(query):
        *settings, architecture_name, device = attributes(query, launch)
        backward_kernels.attention_backward(
            dout,
            dlse,
            query,
            key,
            value,
            launch.mask,
            launch.key_padding,
            launch.cu_seqlens_q,
            launch.cu_seqlens_k,
            launch.seed,
            out,
            lse,
            dquery,
            dkey,
            dvalue,
            dmask,
            *settings,
            exact,
            architecture_name,
            device,
            new,
        )


def refuses(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = too_large(sizes, device, dtype)
    if device.type == "cuda" and not triton.missing():
        reasons += triton.race_refusals(torch.cuda.current_device() if device.index is None else device.index)
    return reasons


def without_plan(new: New) -> Implementation[Forward, Backward]:
    """new(shape): uninitialised float32 memory for a launch."""
    launches = (functools.partial(launch, new=new) for launch in (launch_forward, launch_backward))
    return make_implementation(triton.backend, *launches, readable)


forwards, backwards = Plans(), Plans()


def forward(call: Forward) -> Results:
    query = call.query
    settings = architecture(query.device.index), precision(query), *call[8:13]
    with on_device(query):
        return forwards.call(query, call[:8], settings, lambda new: without_plan(new).forward(call))


def backward(call: Backward) -> Results:
    query, needed = call.query, tuple(call.needed)

    def compute(new: New) -> Results:
        computed = without_plan(new).backward
        assert computed is not None
        return computed(call)

    if needed != (True, True, True, False) or call.dout is None:  # with more than launches, or other results
        return compute(Workspace(query).part)
    settings = architecture(query.device.index), precision(query), *call[12:17]
    with on_device(query):
        return backwards.call(query, call[:12], settings, compute)


implementation = Implementation(triton.backend, forward, backward, refuses)
