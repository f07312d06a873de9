import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from fastlm.backends import selection
from fastlm.core import philox
from fastlm.ops.attention import gpu
from fastlm.ops.attention.spec import Backward, Forward
from tests.ops.attention import NON_FINITE, capped_own, seen
from tests.support import (
    DTYPES,
    SLOW,
    assert_same_bits,
    assert_within_twice_torch,
    error,
    floats,
    implementation_module,
    on_backends,
    on_every_backend,
    on_every_backend_that_raises,
    outputs_and_gradients,
)

# ([(query_len, key_len) of each sequence], heads, num_kv_heads, head_dim): single elements, odd sizes around those of
# vectors and tiles, sequences without queries, keys or both, grouped queries, several blocks of keys and of queries.
BATCHES = [
    ([(1, 1)], 1, 1, 1),
    ([(7, 7), (1, 1), (16, 16), (17, 17), (64, 64)], 3, 3, 16),
    ([(5, 5), (0, 3), (1, 130), (33, 129), (4, 0), (0, 0), (70, 37)], 4, 2, 33),
    ([(129, 129), (2, 2), (128, 128)], 2, 1, 80),
    ([(3, 300), (49, 49), (50, 400)], 6, 2, 5),
    ([(20, 20), (0, 0), (40, 40)], 1, 1, 256),
]


def starts(lengths, dtype=torch.int64):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def cu_seqlens(lengths, dtype=torch.int64):
    return starts([q for q, _ in lengths], dtype), starts([k for _, k in lengths], dtype)


def qkv(lengths, heads, num_kv_heads, head_dim):
    total_q, total_k = (sum(side) for side in zip(*lengths, strict=True))
    key, value = floats(total_k, num_kv_heads, head_dim), floats(head_dim, num_kv_heads, total_k).permute(2, 1, 0)
    return floats(2, total_q, heads, head_dim)[1], key, value


def torch_own(lengths, causal=False, window=None):
    """PyTorch's operator on each sequence; fully masked rows are 0."""

    def attention(q, k, v):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        parts = (t.split([pair[side] for pair in lengths]) for t, side in ((q, 0), (k, 1), (v, 1)))
        outs = []
        for one in zip(*parts, strict=True):
            mask = seen(one[0].shape[0], one[1].shape[0], causal, window)
            visible = mask.any(-1, keepdim=True)
            if not visible.any():
                outs.append(one[0] * 0)
                continue
            out = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in one), attn_mask=mask | ~visible)
            outs.append(torch.where(visible, out[0], 0).transpose(0, 1))
        return torch.cat(outs)

    return attention


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_as_close_to_float64_as_torch(batch, causal, dtype, backend):
    lengths = batch[0]
    ours = lambda *t: fastlm.attention_varlen(*t, *cu_seqlens(lengths), causal=causal, backend=backend)  # noqa: E731
    assert_within_twice_torch(ours, torch_own(lengths, causal), qkv(*batch), dtype)


@on_every_backend
@pytest.mark.parametrize("head_dim", [64, 256])
def test_gradients_where_one_key_has_nearly_all_the_weight(head_dim, backend):
    """There the gradient of the scores is the rounding error of two sums over head_dim.

    It varies by chance between queries, so the mean over hundreds of them is compared.
    """
    lengths = [(20, 20), (40, 40)]
    alike, value = floats(60, 8, head_dim), floats(2, 60, 8, head_dim)[1]
    ours = lambda *t: fastlm.attention_varlen(*t, *cu_seqlens(lengths), backend=backend)  # noqa: E731
    inputs = alike, alike, value
    truths = outputs_and_gradients(torch_own(lengths), [x.double() for x in inputs], torch.float64, torch.float32)
    results, theirs = (outputs_and_gradients(f, inputs, torch.float32) for f in (ours, torch_own(lengths)))
    for a, b, truth in zip(results, theirs, truths, strict=True):
        assert (a - truth).square().mean() <= 2**2 * (b - truth).square().mean()


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "causal, window",
    [(False, (5, 3)), (True, (5, None)), (False, (None, 0)), (False, (0, 0)), (False, (40, None))],
    ids=str,
)
def test_windows(causal, window, dtype, backend):
    """They are relative to the last key of each sequence."""
    lengths = [(50, 50), (20, 90), (1, 70), (30, 10)]
    cu = cu_seqlens(lengths, torch.int32)
    ours = lambda *t: fastlm.attention_varlen(*t, *cu, causal=causal, window=window, backend=backend)  # noqa: E731
    assert_within_twice_torch(ours, torch_own(lengths, causal, window), qkv(lengths, 2, 1, 24), dtype)


@on_every_backend
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.3])
def test_scale(scale, backend):
    lengths = [(9, 9), (4, 4)]
    ours = lambda *t: fastlm.attention_varlen(*t, *cu_seqlens(lengths), scale=scale, backend=backend)  # noqa: E731
    own = lambda q, k, v: torch_own(lengths)(q * (scale * 4), k, v)  # noqa: E731
    assert_within_twice_torch(ours, own, qkv(lengths, 2, 2, 16), torch.float32)


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_capped_scores(dtype, backend):
    lengths = [(9, 9), (1, 1), (40, 40), (3, 17)]
    boundaries = cu_seqlens(lengths)

    def own(q, k, v):
        outs = []
        for (q0, q1), (k0, k1) in zip(*(itertools.pairwise(s) for s in boundaries), strict=True):
            one = (x[None].transpose(1, 2) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
            outs.append(capped_own(1.0, seen(int(q1 - q0), int(k1 - k0), True))(*one)[0].transpose(0, 1))
        return torch.cat(outs)

    assert_within_twice_torch(
        lambda *t: fastlm.attention_varlen(*t, *boundaries, causal=True, softcap=1.0, backend=backend),
        own,
        qkv(lengths, 4, 2, 24),
        dtype,
    )


# Compared with a padded batch


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("causal", [False, True])
def test_matches_a_padded_batch(causal, dropout_p, dtype, backend):
    """Results, log-sum-exp and gradients of real tokens are the same, and so are the dropout masks."""
    lengths, heads, num_kv_heads, head_dim = [130, 1, 77, 0, 200, 64], 4, 2, 32
    if backend in SLOW:
        # Several tiles, some of them full: the interpreter's have 32 and 64 tokens, the CUDA kernels' 64.
        lengths, heads, num_kv_heads = [66, 1, 37, 0, 100, 64], 2, 1
    longest, cu = max(lengths), starts(lengths)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]  # (batch, longest)
    padded = [torch.zeros(len(lengths), longest, n, head_dim, dtype=dtype) for n in (heads, num_kv_heads, num_kv_heads)]
    packed = [x.to(dtype) for x in qkv([(n, n) for n in lengths], heads, num_kv_heads, head_dim)]
    for x, y in zip(padded, packed, strict=True):
        x[real] = y

    def gradients(function, inputs, upstream):
        leaves = [x.clone().requires_grad_() for x in inputs]
        torch.manual_seed(5)
        out, lse = function(*leaves)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, upstream)]

    upstream = floats(sum(lengths), heads, head_dim).to(dtype)
    padded_upstream = torch.zeros_like(padded[0])
    padded_upstream[real] = upstream
    options = {"causal": causal, "dropout_p": dropout_p, "return_lse": True, "backend": backend}
    ours = gradients(lambda q, k, v: fastlm.attention_varlen(q, k, v, cu, cu, **options), packed, upstream)

    def in_a_padded_batch(q, k, v):
        out, lse = fastlm.attention(*(x.transpose(1, 2) for x in (q, k, v)), key_padding=real, **options)
        return out.transpose(1, 2), lse.transpose(1, 2)

    out, lse, *theirs = gradients(in_a_padded_batch, padded, padded_upstream)
    for a, b in zip(ours, (out[real], lse[real].t(), *(x[real] for x in theirs)), strict=True):
        assert (
            a.shape == b.shape
            and error(a, b.double()) <= {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}[a.dtype]
        )


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("seed", [-(2**63), 0x299F31D0A4093822])
def test_dropout_masks_follow_the_definition(seed, backend):
    """Rows and columns count from the start of each sequence; the third word is sequence · heads + head."""
    lengths, heads, p = [(5, 64), (1, 1), (0, 7), (9, 70), (4, 0), (70, 9), (3, 200)], 3, 0.37
    widest = max(k for _, k in lengths)
    query, key = (torch.zeros(sum(side), heads, widest) for side in zip(*lengths, strict=True))
    one_hot = torch.cat([torch.eye(k, widest) for _, k in lengths])[:, None].expand(key.shape)  # the key's position
    tensors = query, key, one_hot, None, None, *cu_seqlens(lengths), torch.tensor(seed)
    unlimited = -(2**62), 2**62
    out = torch.ops.fastlm.attention_forward(*tensors, 1.0, 0.0, *unlimited, p, False, False, backend)[0]
    parts = out.split([q for q, _ in lengths])
    for number, (one, (query_len, key_len)) in enumerate(zip(parts, lengths, strict=True)):
        batch_head = torch.arange(number * heads, (number + 1) * heads)
        expected = philox.dropout_mask(torch.tensor(seed), query_len, key_len, batch_head, p)
        assert torch.equal(one.transpose(0, 1)[..., :key_len] != 0, expected)


# Sequences do not affect each other


@on_every_backend
@pytest.mark.parametrize("value", NON_FINITE, ids=str)
@pytest.mark.parametrize("where", range(3), ids=["query", "key", "value"])
def test_non_finite_values_stay_in_their_sequence(where, value, backend):
    lengths = [(9, 9), (5, 5), (20, 20)]
    tokens = slice(9, 14)
    others = torch.ones(34, dtype=torch.bool)
    others[tokens] = False
    results = []
    ours = lambda *t: fastlm.attention_varlen(*t, *cu_seqlens(lengths), backend=backend)  # noqa: E731
    for written in (value, 0.0):
        inputs = [x.clone() for x in qkv(lengths, 2, 1, 8)]
        inputs[where][tokens] = written
        results.append(outputs_and_gradients(ours, inputs, torch.float32))
    for a, b in zip(*results, strict=True):
        assert a[others].isfinite().all() and torch.equal(a[others], b[others])
    assert not results[0][0][tokens].isfinite().all()


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_memory_around_the_batch_is_not_used(dtype, backend):
    """The other heads, tokens and dimensions of the same memory are NaN."""
    lengths = [(17, 17), (3, 3), (30, 30)]
    results = []
    for around in (torch.nan, 0.0):
        wide = [torch.full((70, 5, 40), around, dtype=dtype) for _ in range(3)]
        inputs = [x[11:61, 1 : 1 + heads, 3:36] for x, heads in zip(wide, (2, 1, 1), strict=True)]
        for x, y in zip(inputs, qkv(lengths, 2, 1, 33), strict=True):
            x.copy_(y)
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = fastlm.attention_varlen(*leaves, *cu_seqlens(lengths), causal=True, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, floats(50, 2, 33).to(dtype))))
    assert all(x.isfinite().all() for x in results[0])
    assert_same_bits(*results)


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequences_without_keys_or_queries(dtype, backend):
    lengths = [(3, 0), (0, 4), (0, 0), (2, 2), (9, 4)]
    leaves = [x.to(dtype).requires_grad_() for x in qkv(lengths, 2, 1, 8)]
    out, lse = fastlm.attention_varlen(*leaves, *cu_seqlens(lengths), causal=True, return_lse=True, backend=backend)
    masked = torch.zeros(14, dtype=torch.bool)
    masked[:3] = masked[5:10] = True  # the first five of nine queries are before all of four keys
    assert not out[masked].any() and out[~masked].all()
    assert torch.equal(lse == -torch.inf, masked.expand(2, 14)) and lse.dtype == torch.float32 and lse.is_contiguous()
    dq, dk, dv = torch.autograd.grad(out, leaves, floats(14, 2, 8).to(dtype))
    assert not dq[masked].any() and dq[~masked].any() and all(d.isfinite().all() for d in (dq, dk, dv))
    assert not dk[:4].any() and not dv[:4].any() and dv[4:].all()


@on_every_backend
@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 3), (0, 0)], [(2, 0), (3, 0)]], ids=str)
def test_batches_without_queries_or_keys(lengths, backend):
    cu = cu_seqlens(lengths)
    leaves = [floats(total, 2, 8).requires_grad_() for total in (int(cu[0][-1]), *[int(cu[1][-1])] * 2)]
    out = fastlm.attention_varlen(*leaves, *cu, backend=backend)
    assert out.shape == leaves[0].shape and not out.any()
    assert all(
        d.shape == x.shape and not d.any() for d, x in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True)
    )


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_log_sum_exp_and_its_gradient(causal, dtype, backend):
    lengths = [(9, 21), (40, 40), (1, 1)]

    def own(q, k, v):
        """PyTorch's operators in the inputs' dtype; scores and log-sum-exp in float32."""
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        outs, lses = [], []
        parts = (t.split([pair[side] for pair in lengths]) for t, side in ((q, 0), (k, 1), (v, 1)))
        for one in zip(*parts, strict=True):
            query, key, value = (t.transpose(0, 1) for t in one)
            scores = (query @ key.mT).to(torch.promote_types(q.dtype, torch.float32)) / 4
            scores = scores.masked_fill(~seen(*map(len, one[:2]), causal), -torch.inf)
            outs.append((torch.softmax(scores, -1).to(q.dtype) @ value).transpose(0, 1))
            lses.append(scores.logsumexp(-1))
        return torch.cat(outs), torch.cat(lses, 1)

    options = {"causal": causal, "return_lse": True, "backend": backend}
    ours = lambda *t: fastlm.attention_varlen(*t, *cu_seqlens(lengths), **options)  # noqa: E731
    assert_within_twice_torch(ours, own, qkv(lengths, 2, 1, 16), dtype)


@on_backends("reference", "cpu", "triton", "cuda")
def test_upstream_gradient_of_one_result_only(backend):
    lengths = [(5, 6), (2, 2)]

    def gradients(which):
        leaves = [t.requires_grad_() for t in qkv(lengths, 2, 2, 8)]
        results = fastlm.attention_varlen(*leaves, *cu_seqlens(lengths), return_lse=True, backend=backend)
        upstreams = floats(7, 2, 8), floats(2, 7)
        return torch.autograd.grad(
            [results[i] for i in which],
            leaves,
            [upstreams[i] for i in which],
            materialize_grads=True,
            allow_unused=True,
        )

    for both, first, second in zip(gradients((0, 1)), gradients((0,)), gradients((1,)), strict=True):
        torch.testing.assert_close(both, first + second)
    assert not gradients((1,))[2].any()  # the log-sum-exp does not depend on the values


# Memory


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_strided_inputs_give_the_same_results(dtype, backend):
    """Views of a packed projection, expanded heads and gradients, and strided heads, against contiguous copies."""
    lengths, heads, head_dim = ([(5, 5), (3, 3)], 2, 16) if backend in SLOW else ([(11, 11), (4, 4), (7, 7)], 3, 16)
    total = sum(q for q, _ in lengths)
    projection = floats(total, 3, heads, head_dim).to(dtype)
    views = projection.unbind(1)
    first = floats(heads, total, head_dim).to(dtype).transpose(0, 1)
    one = floats(total, 1, head_dim).to(dtype).expand(total, heads, head_dim)
    strided = floats(head_dim, heads, total).to(dtype).permute(2, 1, 0)
    upstreams = (
        floats(total, heads, head_dim).to(dtype),
        torch.ones((), dtype=dtype).expand(total, heads, head_dim),
        strided,
    )
    for inputs in (
        views,
        (first, one, one),
        (strided, views[1], strided),
        (views[2], floats(2 * total, 1, head_dim).to(dtype)[::2], strided[:, :1]),
    ):
        results = []
        for variant, is_strided in ((inputs, True), ([t.contiguous() for t in inputs], False)):
            leaves = [t.detach().requires_grad_() for t in variant]
            out = fastlm.attention_varlen(*leaves, *cu_seqlens(lengths), backend=backend)
            dys = [dy if is_strided else dy.contiguous() for dy in upstreams]
            results.append(
                (out.detach(), *(d for dy in dys for d in torch.autograd.grad(out, leaves, dy, retain_graph=True)))
            )
        for a, b in zip(*results, strict=True):
            # PyTorch's order of additions depends on the strides.
            assert error(a, b.double()) <= {torch.float32: 2**-18, torch.bfloat16: 2**-7}[dtype]
        if backend == "cpu":
            assert_same_bits(*results)
        assert all(x.is_contiguous() for x in results[0])


@on_every_backend
def test_cu_seqlens_of_any_integer_dtype_and_stride(backend):
    lengths = [(5, 6), (2, 2), (8, 3)]
    inputs, cu = qkv(lengths, 2, 1, 8), cu_seqlens(lengths)
    expected = fastlm.attention_varlen(*inputs, *cu, backend=backend)
    for variant in ([x.int() for x in cu], [cu[0].int(), cu[1]], [x.repeat_interleave(2)[::2] for x in cu]):
        assert torch.equal(fastlm.attention_varlen(*inputs, *variant, backend=backend), expected)


@on_every_backend
def test_only_needed_gradients_are_returned(backend):
    lengths = [(6, 7), (3, 3)]
    inputs, cu = qkv(lengths, 2, 1, 8), cu_seqlens(lengths)
    ours = lambda *t: fastlm.attention_varlen(*t, *cu, backend=backend)  # noqa: E731
    whole = outputs_and_gradients(ours, inputs, torch.float32)[1:]
    for i, expected in enumerate(whole):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        fastlm.attention_varlen(*leaves, *cu, backend=backend).backward(floats(9, 2, 8))
        torch.testing.assert_close(leaves[i].grad, expected)
        assert all(x.grad is None for j, x in enumerate(leaves) if i != j)


@on_backends("cpu")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_same_bits_on_every_thread_count(dropout_p, dtype, backend):
    """Uneven lengths, split into chunks of queries and of keys."""
    lengths = [(3, 3), (700, 700), (0, 5), (1, 300), (260, 260), (40, 40)]
    inputs = [x.to(dtype) for x in qkv(lengths, 2, 1, 24)]
    options = {"causal": True, "dropout_p": dropout_p, "backend": backend}
    call = lambda *t: fastlm.attention_varlen(*t, *cu_seqlens(lengths), **options)  # noqa: E731
    threads, outcomes = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 4, 2):
            torch.set_num_threads(n)
            torch.manual_seed(5)
            outcomes.append(outputs_and_gradients(call, inputs, dtype))
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert_same_bits(other, outcomes[0])


@on_backends("cpu", "cuda")
def test_many_short_sequences(backend):
    lengths = [(1 + i * 7 % 5, 1 + i * 7 % 5) for i in range(400)]
    ours = lambda *t: fastlm.attention_varlen(*t, *cu_seqlens(lengths), causal=True, backend=backend)  # noqa: E731
    assert_within_twice_torch(ours, torch_own(lengths, True), qkv(lengths, 1, 1, 8), torch.float32)


# Tracing


def test_one_graph_for_all_lengths_under_compile():
    torch._dynamo.reset()
    traces = []

    def counter(graph, inputs):
        traces.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v, a, b: fastlm.attention_varlen(q, k, v, a, b, causal=True),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for lengths in ([(9, 9), (3, 5)], [(7, 7), (2, 2), (30, 40)], [(4, 4), (5, 5), (6, 6), (7, 8)]):
        inputs = *qkv(lengths, 2, 1, 8), *cu_seqlens(lengths)
        torch.testing.assert_close(compiled(*inputs), fastlm.attention_varlen(*inputs, causal=True))
    assert len(traces) == 1


@on_backends("reference", "cpu", "triton", "cuda")
def test_compiled_training_with_lengths_that_change(backend):
    def loss(projection, cu):
        return (
            fastlm.attention_varlen(*projection.unbind(1), cu, cu, causal=True, dropout_p=0.2, backend=backend)
            .square()
            .sum()
        )

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    with torch._inductor.config.patch(fallback_random=True):  # inductor draws seeds otherwise than eager mode
        for lengths in ([9, 3], [20, 5, 2]):
            results = []
            for function in (loss, compiled):
                torch.manual_seed(3)
                projection = floats(sum(lengths), 3, 2, 8).requires_grad_()
                value = function(projection, starts(lengths))
                results.append((value.detach(), *torch.autograd.grad(value, projection)))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


def test_flops_are_counted_sequence_by_sequence():
    """As for attention, two products forward and five backward. While tracing, equal lengths are assumed."""
    lengths = [(9, 21), (3, 3), (4, 0)]
    leaves = [x.requires_grad_() for x in qkv(lengths, 4, 2, 8)]
    with FlopCounterMode(display=False) as counter:
        fastlm.attention_varlen(*leaves, *cu_seqlens(lengths)).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 4 * 8 * (9 * 21 + 3 * 3)
    with FlopCounterMode(display=False) as counter:
        fastlm.attention_varlen(*(x.detach().to("meta") for x in leaves), *(x.to("meta") for x in cu_seqlens(lengths)))
    assert counter.get_total_flops() == 4 * 4 * 8 * (16 * 24 // 3)


# Errors


def call(**changed):
    arguments = {"cu_seqlens_q": torch.tensor([0, 3, 7]), "cu_seqlens_k": torch.tensor([0, 2, 9])}
    arguments |= dict(zip(("query", "key", "value"), qkv([(7, 9)], 4, 2, 8), strict=True)) | changed
    return fastlm.attention_varlen(**arguments)


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"query": floats(1, 7, 4, 8)},
            r"query: expected shape \(total_q, heads, head_dim\), at least one head and head_dim 1 or more, "
            r"got \(1, 7, 4, 8\)",
        ),
        ({"query": floats(7, 4, 8).long()}, r"query: expected a floating-point tensor, got torch.int64"),
        ({"key": floats(9, 2, 7)}, r"key: expected shape \(total_k, num_kv_heads, 8\), as query, got \(9, 2, 7\)"),
        ({"key": floats(9, 3, 8)}, r"key: expected a number of heads that divides query's 4, got 3"),
        ({"value": floats(8, 2, 8)}, r"value: expected shape \(9, 2, 8\), as key, got \(8, 2, 8\)"),
        ({"key": floats(9, 2, 8).half()}, r"key: expected torch.float32 on cpu, as query, got torch.float16 on cpu"),
        (
            {"value": floats(9, 2, 8).half()},
            r"value: expected torch.float32 on cpu, as query, got torch.float16 on cpu",
        ),
        (
            {"cu_seqlens_q": torch.tensor([[0, 3, 7]])},
            r"cu_seqlens_q: expected shape \(batch \+ 1,\), 0 and the end of each sequence, got \(1, 3\)",
        ),
        (
            {"cu_seqlens_k": torch.tensor([], dtype=torch.int64)},
            r"cu_seqlens_k: expected shape \(batch \+ 1,\), 0 and the end of each sequence, got \(0,\)",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0.0, 3, 7])},
            r"cu_seqlens_q: expected torch.int32 or torch.int64 on cpu, got torch.float32 on cpu",
        ),
        (
            {"cu_seqlens_k": torch.tensor([0, 2, 9], device="meta")},
            r"cu_seqlens_k: expected torch.int32 or torch.int64 on cpu, got torch.int64 on meta",
        ),
        ({"cu_seqlens_k": torch.tensor([0, 9])}, r"cu_seqlens_k: expected shape \(3,\), as cu_seqlens_q, got \(2,\)"),
        ({"scale": float("inf")}, r"scale: expected a finite number, got inf"),
        ({"softcap": 0}, r"softcap: expected a positive number, got 0.0"),
        ({"window": (0, -1)}, r"window: expected \(left, right\), each None or an integer of 0 or more, got \(0, -1\)"),
        ({"dropout_p": 1.0}, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
        ({"backend": "gpu"}, r"backend: expected one of cpu, triton, cuda, torch, reference, got 'gpu'"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)


WRONG_STARTS = [
    ({"cu_seqlens_q": torch.tensor([1, 3, 7])}, r"cu_seqlens_q: expected 0 as its first value, got 1"),
    (
        {"cu_seqlens_k": torch.tensor([0, 2, 8])},
        r"cu_seqlens_k: expected 9, the number of tokens of key, as its last value, got 8",
    ),
    (
        {"cu_seqlens_q": torch.tensor([0, 8, 7])},
        r"cu_seqlens_q: expected values that never decrease, got 7 at \[2\], after 8",
    ),
    (
        {"cu_seqlens_k": torch.tensor([0, -2, 9], dtype=torch.int32)},
        r"cu_seqlens_k: expected values that never decrease, got -2 at \[1\], after 0",
    ),
]


@on_every_backend_that_raises
@pytest.mark.parametrize("changed, message", WRONG_STARTS)
def test_invalid_cu_seqlens_are_refused(changed, message, backend):
    """In eager mode, under torch.compile, which does not know the values, and where they changed before backward."""
    with pytest.raises(ValueError, match=message):
        call(backend=backend, **changed)
    torch._dynamo.reset()
    inputs = qkv([(7, 9)], 4, 2, 8)
    wrong = ({"cu_seqlens_q": torch.tensor([0, 3, 7]), "cu_seqlens_k": torch.tensor([0, 2, 9])} | changed).values()
    with pytest.raises(ValueError, match=message):
        torch.compile(lambda *t: fastlm.attention_varlen(*t, backend=backend), backend="eager", fullgraph=True)(
            *inputs, *wrong
        )
    tensors = inputs[0], None, *inputs, None, None, *wrong, None, inputs[0], floats(4, 7)
    needed = [True, True, True, False]
    with pytest.raises(ValueError, match=message):
        torch.ops.fastlm.attention_backward(*tensors, 1.0, 0.0, -9, 9, 0.0, False, needed, backend)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"dropout_p": 0.1}, "draws other dropout masks than fastlm"),
        ({"return_lse": True}, "has no log-sum-exp of a fully masked row, and no gradient of any"),
    ],
)
def test_backend_torch_refuses_what_pytorch_computes_differently(changed, reason):
    with pytest.raises(fastlm.Unsupported, match=f"torch {reason}"):
        call(backend="torch", **changed)
    assert call(**changed) is not None  # another backend is selected


@pytest.mark.skipif(
    torch.get_default_device().type != "cpu", reason="a device assert ends the process: tests/kernels/test_gpu.py"
)
@on_backends("triton", "cuda")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "wrong",
    [(1, 3, 7), (-1, 3, 7), (0, 8, 7), (0, 3, 6), (0, 3, 2**33 + 7), (0, 9, 9), (0, 7, 8), (0, 9, 7), (0, -2, 7)],
    ids=str,
)
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_invalid_cu_seqlens_are_a_device_assert(side, wrong, dtype, backend, monkeypatch):
    """Without the check before the launch. Sequences of negative length have no program of their own, as empty ones."""
    if max(wrong) >= 2**31 and dtype == torch.int32:
        pytest.skip("is not a number of 32 bits")
    monkeypatch.setattr(gpu, "check_boundaries", lambda call: None)
    right, wrong = torch.tensor([0, 3, 7], dtype=dtype), torch.tensor(wrong, dtype=dtype)
    starts = (wrong, right) if side == "queries" else (right, wrong)
    inputs = qkv([(7, 7)], 4, 2, 8)
    asserted = "cu_seqlens: expected" if backend == "triton" else r"assertion failed: .*(query|key)"
    implementation = implementation_module("attention", backend).implementation
    with pytest.raises(Exception, match=asserted):
        implementation.forward(Forward(*inputs, None, None, *starts, None, 1.0, 0.0, -9, 9, 0.0, False, False))
    # The failed launch left no state behind.
    out, lse = implementation.forward(
        Forward(*inputs, None, None, right, right, None, 1.0, 0.0, -9, 9, 0.0, False, False)
    )
    needed = True, True, True, False
    with pytest.raises(Exception, match=asserted):
        implementation.backward(
            Backward(out, None, *inputs, None, None, *starts, None, out, lse, 1.0, 0.0, -9, 9, 0.0, False, needed)
        )


def test_selection_sees_the_sizes_of_the_packed_batch(monkeypatch):
    asked, decide = [], selection.decide
    monkeypatch.setattr(selection, "_selected", {})
    monkeypatch.setattr(selection, "decide", lambda *call: (asked.append(call[-1]), decide(*call))[1])
    fastlm.attention_varlen(*qkv([(1, 3), (1, 2)], 2, 1, 8), *cu_seqlens([(1, 3), (1, 2)]))
    assert [(sizes.batch, sizes.query_len, sizes.key_len, sizes.packed) for sizes in asked] == [(2, 2, 5, True)]
