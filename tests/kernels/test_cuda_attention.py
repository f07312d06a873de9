"""Paths of the CUDA attention kernels that the operator tests do not reach.

A head of every width that they are compiled for, fully visible tiles, split-K, recomputed rows, tokens that are not
aligned. They run on a GPU, or in the emulator, which checks every access.
"""

import pytest
import torch

import fastlm
from tests.ops.attention import qkv, seen, torch_own
from tests.support import (
    DTYPES,
    assert_same_bits,
    assert_within_twice_torch,
    error,
    floats,
    on_backends,
    outputs_and_gradients,
)

only_cuda = on_backends("cuda")
WIDTHS = [
    24,
    64,
    72,
    128,
    136,
    200,
]  # one per width of a tile, and one that reads the widest without 16-byte copies


def seeded(operator):
    """The operator with the same dropout mask in every call."""

    def same(*inputs):
        torch.manual_seed(3)
        return operator(*inputs)

    return same


def assert_like_the_reference(ours, inputs, dtype, bound):
    """Compares results and gradients, also with dropout. ours(backend) is a function of the inputs."""
    for i, (a, b) in enumerate(
        zip(*(outputs_and_gradients(seeded(ours(name)), inputs, dtype) for name in ("cuda", "reference")), strict=True)
    ):
        assert error(a, b.double()) <= bound, f"result {i}"


@only_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", WIDTHS)
def test_heads_of_every_width(head_dim, dtype, backend):
    """Several tiles of queries and keys, some fully visible, and grouped queries."""
    ours = lambda *t: fastlm.attention(*t, causal=True, backend=backend)  # noqa: E731
    assert_within_twice_torch(ours, torch_own(seen(70, 150, True)), qkv(1, 2, 1, 70, 150, head_dim), dtype)


@only_cuda
@pytest.mark.parametrize(
    "causal, window", [(False, None), (True, None), (False, (70, 5)), (True, (130, None)), (False, (None, 90))], ids=str
)
def test_tiles_fully_partly_and_not_visible(causal, window, backend):
    mask = seen(260, 300, causal, window)
    for dtype in (torch.float32, torch.bfloat16):
        ours = lambda *t: fastlm.attention(*t, causal=causal, window=window, backend=backend)  # noqa: E731
        assert_within_twice_torch(ours, torch_own(mask), qkv(1, 1, 1, 260, 300, 16), dtype)


@only_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", WIDTHS)
def test_dropout_in_tiles_of_every_size(head_dim, dtype, backend):
    """A tile of keys has 16 to 64 of the 64 columns of a counter, a tile of queries 16 to 64 rows."""
    ours = lambda name: lambda *t: fastlm.attention(*t, dropout_p=0.4, backend=name)  # noqa: E731
    assert_like_the_reference(
        ours, qkv(2, 2, 1, 50, 140, head_dim), dtype, {torch.float32: 2**-18, torch.float16: 2**-9}[dtype]
    )


@only_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", WIDTHS[::2])
@pytest.mark.parametrize("shape", [(2, 2, 70, 90), (1, 1, 70, 90), (2, 1, 1, 90), (1, 1, 1, 90)], ids=str)
def test_gradients_of_masks_over_several_tiles(shape, head_dim, dtype, backend):
    ours = lambda q, k, v, m: fastlm.attention(q, k, v, mask=m, backend=backend)  # noqa: E731
    assert_within_twice_torch(ours, torch_own(), (*qkv(2, 2, 2, 70, 90, head_dim), floats(*shape)), dtype)


@only_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [40, 136])
def test_recomputed_rows(head_dim, dtype, backend):
    """A NaN that padding hides gives the same results as a 0, with mask, window and dropout."""
    real = torch.rand(2, 90) > 0.2
    mask = floats(1, 4, 40, 90)
    mask[..., 7] = -torch.inf
    hidden = ~real
    hidden[:, 7] = True
    results = []
    for stands in (0.0, torch.nan, torch.inf):
        q, k, v = (x.to(dtype) for x in qkv(2, 4, 2, 40, 90, head_dim))
        k.masked_fill_(hidden[:, None, :, None], stands)
        v.masked_fill_(hidden[:, None, :, None], -stands)
        ours = seeded(
            lambda *t: fastlm.attention(
                *t, key_padding=real, mask=mask, window=(60, 20), dropout_p=0.3, return_lse=True, backend=backend
            )
        )
        results.append(outputs_and_gradients(ours, (q, k, v), dtype))
    for harmed in results[1:]:
        for a, b in zip(harmed, results[0], strict=True):
            assert error(a, b.double()) <= {torch.float32: 2**-18, torch.bfloat16: 2**-6}[dtype]


# Split-K


@only_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, num_kv_heads, query_len", [(2, 2, 1), (8, 2, 1), (3, 1, 5)])
def test_few_queries_and_many_keys(heads, num_kv_heads, query_len, dtype, backend):
    """The last split is short, and with a window the first is not visible."""
    q, k, v = qkv(1, heads, num_kv_heads, query_len, 700, 40)
    for window in (None, (200, None)):
        ours = lambda *t, w=window: fastlm.attention(*t, causal=True, window=w, backend=backend)  # noqa: E731
        assert_within_twice_torch(ours, torch_own(seen(query_len, 700, True, window)), (q, k, v), dtype)


@only_cuda
def test_few_queries_with_every_kind_of_mask(backend):
    """A split and a batch of padding only, NaN in the padding, an additive mask by head, dropout, the log-sum-exp."""
    real = torch.rand(3, 700) > 0.3
    real[0, :300] = real[1] = False
    mask = floats(1, 4, 2, 700)
    results = []
    for stands, name in ((0.0, "reference"), (0.0, backend), (torch.nan, backend)):
        q, k, v = qkv(3, 4, 2, 2, 700, 40)
        k.masked_fill_(~real[:, None, :, None], stands)
        v.masked_fill_(~real[:, None, :, None], stands)
        torch.manual_seed(3)
        results.append(
            fastlm.attention(q, k, v, key_padding=real, mask=mask, dropout_p=0.3, return_lse=True, backend=name)
        )
    for out, lse in results[1:]:
        assert not out[1].any() and (lse[1] == -torch.inf).all()
        assert error(out, results[0][0].double()) <= 2**-18 and error(lse[::2], results[0][1][::2].double()) <= 2**-18


# Memory and precision


@only_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_that_are_not_aligned(dtype, backend):
    """Tokens are read in 16-byte chunks if aligned, otherwise element by element: the results are the same."""
    results = []
    for begin, stride in ((0, 40), (1, 40), (8, 41)):
        inputs = []
        for x in qkv(1, 2, 1, 70, 80, 40):
            memory = torch.zeros(x.shape[1] * x.shape[2] * stride + begin, dtype=dtype)
            inputs.append(memory[begin:].view(1, *x.shape[1:3], stride)[..., :40].copy_(x))
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = fastlm.attention(*leaves, causal=True, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, floats(*out.shape).to(dtype))))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@only_cuda
@pytest.mark.parametrize("head_dim", [40, 136])
def test_products_are_rounded_only_where_the_user_allows_it(head_dim, backend):
    inputs = qkv(1, 2, 1, 70, 80, head_dim)
    call = lambda *t: fastlm.attention(*t, causal=True, backend=backend)  # noqa: E731
    whole = outputs_and_gradients(call, inputs, torch.float32)
    try:
        torch.set_float32_matmul_precision("high")
        rounded = outputs_and_gradients(call, inputs, torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, b in zip(rounded, whole, strict=True):
        assert 2**-18 < error(a, b.double()) < 2**-8


@only_cuda
@pytest.mark.parametrize("head_dim", [16, 136])
def test_the_same_bits_every_time(head_dim, backend):
    """Sums over heads and over the broadcast dimensions of a mask have a fixed order."""
    inputs = *(x.bfloat16() for x in qkv(2, 4, 2, 40, 70, head_dim)), floats(1, 1, 1, 70)
    call = seeded(lambda q, k, v, m: fastlm.attention(q, k, v, mask=m, dropout_p=0.2, backend=backend))
    first = outputs_and_gradients(call, inputs, torch.bfloat16)
    for _ in range(3):
        assert_same_bits(outputs_and_gradients(call, inputs, torch.bfloat16), first)


@only_cuda
@pytest.mark.parametrize("sequences", [31, 32, 33, 100])
def test_many_short_sequences(sequences, backend):
    """A warp looks for its tile among 32 at a time. Some are empty, some have several tiles."""
    lengths = [(7 * i) % 5 + (70 if i % 29 == 28 else 0) for i in range(sequences)]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = (floats(sum(lengths), 2, 8) for _ in range(3))

    def run(name):
        def function(*t):
            return fastlm.attention_varlen(*t, starts, starts, causal=True, backend=name)

        return outputs_and_gradients(function, (q, k, v), torch.float32)

    for ours, expected in zip(run(backend), run("reference"), strict=True):
        assert error(ours, expected.double()) <= 2**-18
