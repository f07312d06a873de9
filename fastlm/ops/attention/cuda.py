"""attention by the CUDA kernels (csrc/cuda/attention*.cu)."""

import torch

from fastlm.backends import cuda
from fastlm.backends.gpu import on_device, precision
from fastlm.core.layout import contiguous_last
from fastlm.ops.attention.gpu import Launch, make_implementation

MAX_DECODE_QUERIES = 16  # of all heads that share a key head: with so few, one sequence does not fill a GPU
MIN_SPLIT_SIZE = 256  # keys
MAX_BLOCKS = 1024  # fill any GPU
MAX_SPLITS = 128


def splits_of(batch: int, num_kv_heads: int, key_len: int) -> tuple[int, int]:
    """(keys of a split, number of splits) of split-K, from the sizes alone."""
    wanted = max(1, min(MAX_BLOCKS // max(1, batch * num_kv_heads), MAX_SPLITS, -(-key_len // MIN_SPLIT_SIZE)))
    split_size = -(-key_len // (wanted * MIN_SPLIT_SIZE)) * MIN_SPLIT_SIZE
    return split_size, -(-key_len // split_size)


def launch_forward(query, key, value, out, lse, launch: Launch) -> None:
    batch, heads, num_kv_heads, query_len, key_len, head_dim = launch.sizes
    lower, upper = launch.band
    queries = heads // num_kv_heads * query_len
    if launch.cu_seqlens_q is not None or queries > MAX_DECODE_QUERIES or key_len <= MIN_SPLIT_SIZE:
        with on_device(query):
            device, stream = cuda.device_and_stream(query)
            cuda.kernels.attention_forward(
                query=query,
                key=key,
                value=value,
                out=out,
                lse=lse,
                mask=launch.mask,
                key_padding=launch.key_padding,
                query_starts=launch.cu_seqlens_q,
                key_starts=launch.cu_seqlens_k,
                seed=launch.seed,
                scale=launch.scale,
                softcap=launch.softcap,
                lower=lower,
                upper=upper,
                dropout_p=launch.dropout_p,
                tf32=precision(query) == "tf32",
                device=device,
                stream=stream,
            )
        return
    split_size, num_splits = splits_of(batch, num_kv_heads, key_len)
    partial_out = query.new_empty((batch, heads, query_len, num_splits, head_dim), dtype=torch.float32)
    partial_max, partial_sum = partial_out.new_empty((2, batch, heads, query_len, num_splits))
    with on_device(query):
        device, stream = cuda.device_and_stream(query)
        cuda.kernels.attention_decode(
            query=query,
            key=key,
            value=value,
            out=out,
            lse=lse,
            mask=launch.mask,
            key_padding=launch.key_padding,
            query_starts=None,
            key_starts=None,
            seed=launch.seed,
            scale=launch.scale,
            softcap=launch.softcap,
            lower=lower,
            upper=upper,
            dropout_p=launch.dropout_p,
            tf32=precision(query) == "tf32",
            partial_out=partial_out,
            partial_max=partial_max,
            partial_sum=partial_sum,
            split_size=split_size,
            device=device,
            stream=stream,
        )


def launch_backward(
    dout, dlse, query, key, value, out, lse, dquery, dkey, dvalue, dmask, exact: bool, launch: Launch
) -> None:
    lower, upper = launch.band
    with on_device(query):
        device, stream = cuda.device_and_stream(query)
        cuda.kernels.attention_backward(
            query=query,
            key=key,
            value=value,
            out=out,
            lse=lse,
            mask=launch.mask,
            key_padding=launch.key_padding,
            query_starts=launch.cu_seqlens_q,
            key_starts=launch.cu_seqlens_k,
            seed=launch.seed,
            scale=launch.scale,
            softcap=launch.softcap,
            lower=lower,
            upper=upper,
            dropout_p=launch.dropout_p,
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


implementation = make_implementation(cuda.backend, launch_forward, launch_backward, contiguous_last)
