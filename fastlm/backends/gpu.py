"""What the Triton and the CUDA C++ backend share: the device that a kernel runs on, memory for its results, and the form of its arguments."""

import contextlib
import functools
from typing import NamedTuple

import torch

from fastlm.backends import reference
from fastlm.backends import torch as native
from fastlm.backends.reference import shift_gradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FURTHEST = 2**30  # positions and distances are 32-bit numbers in the kernels
WIDEST_HEAD = 256  # of what a tile of attention holds


def beyond(operator, features):
    """Reasons: what of a call's sizes is more than the kernels of attention count or hold."""
    reasons = []
    if operator == "attention" and max(features["query_len"], features["key_len"]) > FURTHEST:
        reasons.append(
            f"counts up to {FURTHEST} queries and keys, not {max(features['query_len'], features['key_len'])}"
        )
    if operator == "attention_varlen" and max(features["query_tokens"], features["key_tokens"]) > FURTHEST:
        reasons.append(f"counts up to {FURTHEST} tokens, not {max(features['query_tokens'], features['key_tokens'])}")
    if operator in ("attention", "attention_varlen") and features["head_dim"] > WIDEST_HEAD:
        reasons.append(f"holds heads of head_dim up to {WIDEST_HEAD}, not {features['head_dim']}")
    return reasons


def on(x):
    """Kernels launch on the device that is current, and on its current stream: make it x's."""
    return (
        torch.cuda.device(x.device)
        if x.is_cuda and x.device.index != torch.cuda.current_device()
        else contextlib.nullcontext()
    )


def new_like(x, wanted=True, dtype=None):
    if not wanted:
        return None
    if dtype is None and x.is_contiguous():  # said in fewer words, which take PyTorch time to read
        return torch.empty_like(x)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def new_of_rows(x):
    """Two numbers in float32 for each row of x."""
    one = x.new_empty(
        tuple(x.shape[:-1]), dtype=torch.float32
    )  # PyTorch reads a tuple a microsecond faster than a torch.Size
    return one, torch.empty_like(one)


def dropout(p):
    """(threshold, scale): an element is kept iff its word is at least the one, and multiplied by the other."""
    return int(p * 2**32), 1 / (1 - p)


def vector(parameter):
    return parameter if parameter is None else parameter.contiguous()


@functools.cache
def processors(index):
    """How many programs a GPU runs at least at a time; None without one."""
    return None if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def by_layout(weight, layout):
    """The strides of a weight along its input and its output."""
    n, k = weight.stride()
    return (k, n) if layout == "linear" else (n, k)


def tokens_first(x, wanted=True):
    """Memory for a result like x, (B, H, T, D), that lies as (B, T, H, D): merging its heads is then a view."""
    if not wanted:
        return None
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def precision(x):
    """Of products: full float32 unless the user asked PyTorch for less, by what PyTorch's own products follow. 16-bit operands are multiplied exactly."""
    if x.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    # Whatever the user set it with: set_float32_matmul_precision and allow_tf32 write it too, and "none" everywhere is full precision. Reading
    # through those raises once the settings of products, of CUDA or of all differ.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def clamped(lower, upper):
    return max(-FURTHEST, min(lower, FURTHEST)), max(-FURTHEST, min(upper, FURTHEST))


# linear_cross_entropy: the vendor's products around a kernel that turns a chunk of logits into its gradient


LINE = 128  # bytes: rows of logits begin at multiples of it, whatever the vocabulary, as vectors and the vendor's products want them (50257 is odd)


def losses_and_gradients(x, weight, bias, targets, row_scale, loss, needed, chunk_bytes, shares_of, turn):
    """The gradients of x, weight and bias that are needed, by chunks of rows (rows, width); loss (rows,) is filled.

    turn(logits, targets, row scale, loss, statistics, shares) makes the gradient of a chunk's logits out of them, whose rows begin at a LINE each; where the
    bias needs its gradient, as the sum of shares_of(rows) shares, with statistics (2, rows or a few more) to work in.
    """
    rows, vocab, of_line = x.shape[0], weight.shape[0], LINE // x.element_size()
    stride = -(-vocab // of_line) * of_line
    dx = x.new_empty(x.shape) if needed[0] else None
    dweight = None if rows else torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dbias = loss.new_zeros(vocab) if needed[2] else None
    chunk = max(1, chunk_bytes // (stride * x.element_size()))
    # In chunks of 16 rows every chunk's targets and losses are aligned alike, so that Triton compiles one kernel for all of them.
    chunk = min(rows, chunk // 16 * 16 or chunk)
    memory = x.new_empty(chunk, stride)
    for begin in range(0, rows, max(1, chunk)):
        part, target, result = (t[begin : begin + chunk] for t in (x, targets, loss))
        scale = None if row_scale is None else row_scale[begin : begin + chunk]
        count = part.shape[0]
        logits = memory[:count, :vocab]
        torch.mm(part, weight.t(), out=logits) if bias is None else torch.addmm(bias, part, weight.t(), out=logits)
        statistics = shares = None
        if dbias is not None:
            statistics, shares = loss.new_empty(2, -(-count // 4) * 4), loss.new_empty(shares_of(count), vocab)
        turn(logits, target, scale, result, statistics, shares)
        if dbias is not None:
            dbias += shares.sum(0)
        if dx is not None:
            torch.mm(logits, weight, out=dx[begin : begin + chunk])
        if needed[1]:
            dweight = native.add_product(dweight, logits.t(), part, begin + chunk >= rows)
    return dx, dweight if needed[1] else None, dbias if dbias is None else dbias.to(x.dtype)


# attention, of which attention_varlen is a batch of one whose sequences the kernels find themselves


class AttentionCall(NamedTuple):
    """What a launch is told besides its tensors."""

    sizes: tuple[int, ...]  # batch (or packed sequences), heads, key heads, queries, keys, head_dim
    mask: torch.Tensor | None
    key_padding: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seed: torch.Tensor | None
    scale: float
    lower: int
    upper: int
    dropout_p: float

    @property
    def band(self):
        return clamped(self.lower, self.upper)


def packed(x):
    """(tokens, heads, head_dim) as a batch of one, (1, heads, tokens, head_dim)."""
    return x.transpose(0, 1)[None]


def check_starts(query, key, cu_seqlens_q, cu_seqlens_k):
    """On a CPU the values are looked at; on a GPU, where that would wait for it, the kernel asserts."""
    if query.is_cpu:
        reference.starts_of("cu_seqlens_q", cu_seqlens_q, query.shape[0])
        reference.starts_of("cu_seqlens_k", cu_seqlens_k, key.shape[0])


def attention_operators(launch_forward, launch_backward, near):
    """A backend's attention_forward, attention_backward, attention_varlen_forward and attention_varlen_backward.

    launch_forward(query, key, value, out, lse, call) fills out and lse; launch_backward(dout, dlse, query, key, value, out, lse, dquery, dkey, dvalue, dmask,
    exact, call) the gradients, of which the last three may be None, dkey and dvalue both; `exact` asks for products that round no operand to 16 bits. All are
    (batch, heads, tokens, head_dim), lse and dlse contiguous (batch, heads, queries). near(x): x, or a copy of it that lies as the kernels read it.
    """

    def attention_forward(query, key, value, mask, key_padding, seed, scale, lower, upper, dropout_p):
        batch, heads, query_len, head_dim = query.shape
        out, lse = tokens_first(query), query.new_empty((batch, heads, query_len), dtype=torch.float32)
        if query.numel() == 0 or key.numel() == 0:  # no one to look, or nothing to see
            return out.zero_(), lse.fill_(-torch.inf)
        sizes = batch, heads, key.shape[1], query_len, key.shape[2], head_dim
        call = AttentionCall(sizes, mask, key_padding, None, None, seed, scale, lower, upper, dropout_p)
        launch_forward(near(query), near(key), near(value), out, lse, call)
        return out, lse

    def attention_backward(
        dout, dlse, query, key, value, mask, key_padding, seed, out, lse, scale, lower, upper, dropout_p, needed
    ):
        needs_query, needs_key, needs_value, needs_mask = needed
        dquery = tokens_first(query)  # its pass computes what the others need too
        dkey, dvalue = tokens_first(key, needs_key or needs_value), tokens_first(value, needs_key or needs_value)
        shifts = needs_mask and mask.shape[3] == 1
        dmask = mask.new_empty(mask.shape, dtype=torch.float32) if needs_mask and not shifts else None
        if query.numel() == 0 or key.numel() == 0:
            dquery, dkey, dvalue, dmask = (d if d is None else d.zero_() for d in (dquery, dkey, dvalue, dmask))
        else:
            batch, heads, query_len, head_dim = query.shape
            sizes = batch, heads, key.shape[1], query_len, key.shape[2], head_dim
            call = AttentionCall(sizes, mask, key_padding, None, None, seed, scale, lower, upper, dropout_p)
            dout = torch.zeros_like(out) if dout is None else near(dout)
            # out and lse are as they were, unless a hook on saved tensors laid them out anew.
            tensors = near(query), near(key), near(value), near(out), lse.contiguous()
            launch_backward(
                dout,
                vector(dlse),
                *tensors,
                dquery,
                dkey,
                dvalue,
                dmask,
                needs_mask and query.dtype.itemsize == 2,
                call,
            )
        if shifts:
            dmask = shift_gradient(mask, lse, dlse)
        return (
            dquery if needs_query else None,
            dkey if needs_key else None,
            dvalue if needs_value else None,
            dmask.to(mask.dtype) if needs_mask else None,
        )

    def call_of(query, key, cu_seqlens_q, cu_seqlens_k, *settings):
        (query_tokens, heads, head_dim), (key_tokens, key_heads, _) = query.shape, key.shape
        sizes = cu_seqlens_q.shape[0] - 1, heads, key_heads, query_tokens, key_tokens, head_dim
        return AttentionCall(sizes, None, None, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), *settings)

    def attention_varlen_forward(query, key, value, cu_seqlens_q, cu_seqlens_k, seed, scale, lower, upper, dropout_p):
        check_starts(query, key, cu_seqlens_q, cu_seqlens_k)
        out, lse = new_like(query), query.new_empty(query.shape[1::-1], dtype=torch.float32)
        if query.numel() == 0 or key.numel() == 0:
            return out.zero_(), lse.fill_(-torch.inf)
        call = call_of(query, key, cu_seqlens_q, cu_seqlens_k, seed, scale, lower, upper, dropout_p)
        launch_forward(*(near(packed(x)) for x in (query, key, value)), packed(out), lse[None], call)
        return out, lse

    def attention_varlen_backward(
        dout,
        dlse,
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        seed,
        out,
        lse,
        scale,
        lower,
        upper,
        dropout_p,
        needed,
    ):
        check_starts(query, key, cu_seqlens_q, cu_seqlens_k)
        if query.numel() == 0 or key.numel() == 0:
            return tuple(
                torch.zeros_like(x) if need else None for x, need in zip((query, key, value), needed, strict=True)
            )
        dquery = new_like(query)
        dkey, dvalue = (new_like(x, needed[1] or needed[2]) for x in (key, value))
        call = call_of(query, key, cu_seqlens_q, cu_seqlens_k, seed, scale, lower, upper, dropout_p)
        dout = torch.zeros_like(out) if dout is None else dout
        dout, query, key, value, out = (near(packed(x)) for x in (dout, query, key, value, out))
        gradients = [d if d is None else packed(d) for d in (dquery, dkey, dvalue)]
        launch_backward(
            dout,
            None if dlse is None else dlse.contiguous()[None],
            query,
            key,
            value,
            out,
            lse.contiguous()[None],
            *gradients,
            None,
            False,
            call,
        )
        return tuple(gradient if need else None for gradient, need in zip((dquery, dkey, dvalue), needed, strict=True))

    return attention_forward, attention_backward, attention_varlen_forward, attention_varlen_backward
