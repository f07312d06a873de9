"""attention by the Triton kernels (kernels/attention*.py)."""

import dataclasses

import torch
from torch import Tensor

from fastlm.backends import triton
from fastlm.backends.gpu import dropout_arguments, on_device, precision
from fastlm.backends.triton import architecture
from fastlm.core.layout import contiguous_last
from fastlm.kernels import attention as kernels
from fastlm.kernels import attention_backward as backward_kernels
from fastlm.kernels import attention_decode as decode_kernels
from fastlm.ops.attention.gpu import Launch, make_implementation
from fastlm.ops.attention.gpu import refuses as too_large
from fastlm.ops.attention.spec import Sizes


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


def launch_forward(query, key, value, out, lse, launch: Launch) -> None:
    _, heads, num_kv_heads, query_len, key_len, _ = launch.sizes

    def new(shape: tuple[int, ...]) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    tensors, masks = (query, key, value, out, lse), (launch.mask, launch.key_padding)
    with on_device(query):
        if launch.cu_seqlens_q is None and decode_kernels.serves(heads, num_kv_heads, query_len, key_len):
            decode_kernels.attention_decode(
                *tensors,
                *masks,
                launch.seed,
                *attributes(query, launch),
                new,
            )
        else:
            starts = launch.cu_seqlens_q, launch.cu_seqlens_k
            kernels.attention_forward(*tensors, *masks, *starts, launch.seed, *attributes(query, launch), new)


def launch_backward(
    dout, dlse, query, key, value, out, lse, dquery, dkey, dvalue, dmask, exact: bool, launch: Launch
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
            lambda shape: query.new_empty(shape, dtype=torch.float32),
        )


def refuses(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = too_large(sizes, device, dtype)
    if device.type == "cuda" and not triton.missing():
        reasons += triton.race_refusals(torch.cuda.current_device() if device.index is None else device.index)
    return reasons


implementation = dataclasses.replace(
    make_implementation(triton.backend, launch_forward, launch_backward, readable), refuses=refuses
)
