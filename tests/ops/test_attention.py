import pytest
import torch

import fastlm
from tests.ops.attention import MASK_SHAPES, NON_FINITE, SIZES, bool_mask, qkv, seen, torch_own
from tests.support import (
    BACKENDS,
    DTYPES,
    SLOW,
    assert_same_bits,
    assert_within_twice_torch,
    error,
    floats,
    implementation_module,
    on_backends,
    on_every_backend,
    outputs_and_gradients,
)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_as_close_to_float64_as_torch(sizes, causal, dtype, backend):
    q, k, v = qkv(*sizes)
    if causal and sizes[3] > sizes[4]:
        q = q[:, :, : sizes[4]]  # fully masked rows have their own test
    mask = seen(q.shape[2], sizes[4], causal)
    assert_within_twice_torch(
        lambda *t: fastlm.attention(*t, causal=causal, backend=backend),
        torch_own(mask if causal else None),
        (q, k, v),
        dtype,
    )


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "causal, window",
    [(False, (5, 3)), (True, (5, None)), (False, (None, 0)), (False, (0, 0)), (False, (40, None)), (True, (0, 9))],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(50, 50), (20, 90), (1, 70)], ids=str)
def test_windows(lengths, causal, window, dtype, backend):
    sizes = (1, 2, 1, *lengths, 24)
    assert_within_twice_torch(
        lambda *t: fastlm.attention(*t, causal=causal, window=window, backend=backend),
        torch_own(seen(*lengths, causal, window)),
        qkv(*sizes),
        dtype,
    )


@on_backends("cpu", "torch")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal, window", [(False, (64, 64)), (True, (20, None)), (False, (130, 7))], ids=str)
@pytest.mark.parametrize("lengths", [(300, 300), (130, 411)], ids=str)
def test_windows_of_a_part_of_the_keys(lengths, causal, window, dtype, backend):
    """Tiles of queries whose windows begin and end anywhere in a block of keys."""
    assert_within_twice_torch(
        lambda *t: fastlm.attention(*t, causal=causal, window=window, backend=backend),
        torch_own(seen(*lengths, causal, window)),
        qkv(1, 2, 1, *lengths, 24),
        dtype,
    )


@on_backends("cpu")
@pytest.mark.parametrize("window", [(64, 64), (20, 0), (130, 7)], ids=str)
def test_dropout_and_masked_values_under_a_window(window, backend):
    """Weights are dropped as in the reference; what no query of a tile attends reaches no result."""

    def results(backend, masked_value):
        q, k, v = qkv(1, 2, 1, 150, 411, 24)
        hidden = torch.zeros(411, dtype=torch.bool)
        hidden[: 411 - 150 - window[0]] = True  # before all windows
        leaves = [q, k.masked_fill(hidden[:, None], masked_value), v.masked_fill(hidden[:, None], masked_value)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        torch.manual_seed(5)
        out = fastlm.attention(*leaves, window=window, dropout_p=0.3, backend=backend)
        return out.detach(), *torch.autograd.grad(out, leaves, floats(*out.shape))

    expected = results("reference", 0.0)
    for masked_value in (0.0, *NON_FINITE):
        for found, reference in zip(results(backend, masked_value), expected, strict=True):
            torch.testing.assert_close(found, reference)


def test_grouped_queries_without_pytorchs_native_support(monkeypatch):
    def run():
        ours = lambda *t: fastlm.attention(*t, causal=True, backend="torch")  # noqa: E731
        return outputs_and_gradients(ours, qkv(2, 6, 2, 9, 9, 16), torch.float32)

    native = run()
    monkeypatch.setattr(implementation_module("attention", "torch"), "NATIVE_GQA", False)
    for a, b in zip(run(), native, strict=True):
        assert error(a, b.double()) <= 2**-20


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_bool_masks(shape, dtype, backend):
    mask = bool_mask(shape)
    assert_within_twice_torch(
        lambda *t: fastlm.attention(*t, mask=mask, backend=backend), torch_own(mask), qkv(2, 3, 3, 9, 21, 16), dtype
    )


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_additive_masks_and_their_gradients(shape, dtype, backend):
    bias = floats(*shape)
    assert_within_twice_torch(
        lambda q, k, v, m: fastlm.attention(q, k, v, mask=m, backend=backend),
        torch_own(),
        (*qkv(2, 3, 3, 9, 21, 16), bias),
        dtype,
    )


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", [None, torch.float32])
def test_additive_masks_without_gradient(mask_dtype, dtype, backend):
    for shape in MASK_SHAPES:
        bias = floats(*shape).to(mask_dtype or dtype)
        bias[..., 0, -1] = -torch.inf if shape[-1] > 1 else 2.0
        own = lambda q, k, v, m=bias: torch_own()(q, k, v, m.to(q.dtype))  # noqa: E731
        assert_within_twice_torch(
            lambda *t, m=bias: fastlm.attention(*t, mask=m, backend=backend), own, qkv(2, 3, 1, 9, 21, 16), dtype
        )


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_float32_mask_in_a_16_bit_model_has_a_float32_gradient(dtype, backend):
    q, k, v = (t.to(dtype) for t in qkv(1, 2, 2, 6, 6, 8))
    bias = floats(1, 1, 6, 6).requires_grad_()
    out = fastlm.attention(q, k, v, mask=bias, backend=backend)
    (got,) = torch.autograd.grad(out, bias, floats(*out.shape).to(dtype))
    wide = floats(1, 1, 6, 6).double().requires_grad_()
    truth = torch_own()(q.double(), k.double(), v.double(), wide)
    (expected,) = torch.autograd.grad(truth, wide, floats(*out.shape).to(dtype).double())
    assert got.dtype == torch.float32
    assert error(got, expected) < 2**-18  # no intermediate is rounded to 16 bits


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_all_kinds_of_masks_combine(dtype, backend):
    padding = torch.ones(2, 30, dtype=torch.bool)
    padding[0, :9] = padding[1, 25:] = False
    mask = bool_mask((1, 3, 30, 30)) | torch.eye(30, dtype=torch.bool)
    whole = mask & seen(30, 30, True, (12, None)) & padding[:, None, None]
    whole_rows = whole.any(-1, keepdim=True)
    q, k, v = qkv(2, 3, 1, 30, 30, 16)
    assert_within_twice_torch(
        lambda *t: fastlm.attention(
            *t, causal=True, window=(12, None), mask=mask, key_padding=padding, backend=backend
        ),
        lambda *t: torch.where(whole_rows, torch_own(whole | ~whole_rows)(*t), 0),
        (q, k, v),
        dtype,
    )


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fully_masked_rows_are_zero(dtype, backend):
    """They have no gradient either, whatever masks them, and do not change the other rows."""
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[1] = False
    row = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    row[0, 0, 5] = False
    ways = [
        ({"key_padding": padding}, (slice(None), slice(1, 2))),
        ({"mask": row}, (slice(5, 6), slice(None))),
        ({"mask": torch.where(row, 0.0, -torch.inf)}, (slice(5, 6), slice(None))),
        ({"mask": row, "causal": True}, (slice(5, 6), slice(None))),
    ]
    for arguments, (queries, batches) in ways:
        leaves = [t.to(dtype).requires_grad_() for t in qkv(2, 2, 2, 12, 12, 8)]
        out = fastlm.attention(*leaves, backend=backend, **arguments)
        assert not out[batches, :, queries].any()
        dq, dk, dv = torch.autograd.grad(out, leaves, floats(*out.shape).to(dtype))
        assert not dq[batches, :, queries].any() and all(d.isfinite().all() for d in (dq, dk, dv))
        assert batches == slice(None) or not (dk[batches].any() or dv[batches].any())
    causal = fastlm.attention(*(t.to(dtype) for t in qkv(1, 2, 2, 9, 4, 8)), causal=True, backend=backend)
    assert not causal[:, :, :5].any() and causal[:, :, 5:].all()


@on_backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "causal, sizes", [(False, (2, 3, 1, 9, 21, 16)), (True, (1, 2, 2, 40, 40, 33)), (True, (1, 1, 1, 9, 4, 8))]
)
def test_log_sum_exp_and_its_gradient(causal, sizes, dtype, backend):
    mask = seen(sizes[3], sizes[4], causal)

    def own(q, k, v):
        """PyTorch's operators in the inputs' dtype; scores and log-sum-exp in float32."""
        k, v = (t.repeat_interleave(sizes[1] // sizes[2], 1) for t in (k, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = ((q @ k.mT).to(wide) / sizes[5] ** 0.5).masked_fill(~mask, -torch.inf)
        visible = mask.any(-1)[:, None]
        weights = torch.softmax(torch.where(visible, scores, 0), -1).to(q.dtype)
        return torch.where(visible, weights @ v, 0), scores.logsumexp(-1)[..., -4:]  # fully masked rows are first

    def ours(q, k, v):
        out, lse = fastlm.attention(q, k, v, causal=causal, return_lse=True, backend=backend)
        return out, lse[..., -4:]

    assert_within_twice_torch(ours, own, qkv(*sizes), dtype)
    lse = fastlm.attention(*(t.to(dtype) for t in qkv(*sizes)), causal=causal, return_lse=True, backend=backend)[1]
    assert lse.dtype == torch.float32 and lse.shape == sizes[:2] + sizes[3:4] and lse.is_contiguous()
    assert torch.equal(lse == -torch.inf, (~mask.any(-1)).expand(lse.shape))


@on_backends("reference", "cpu", "triton", "cuda")
def test_upstream_gradient_of_one_result_only(backend):
    def gradients(which):
        leaves = [t.requires_grad_() for t in qkv(1, 2, 2, 5, 6, 8)]
        results = fastlm.attention(*leaves, return_lse=True, backend=backend)
        upstreams = floats(1, 2, 5, 8), floats(1, 2, 5)
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


@on_every_backend
@pytest.mark.parametrize("where", ["key", "value"])
def test_masked_values_never_reach_a_result(where, backend):
    """With every kind of mask, results and gradients are those of a masked 0."""
    batch = 1 if backend in SLOW else 2
    sizes = (batch, 2, 1, 24, 24, 8)
    hidden = torch.zeros(batch, 24, dtype=torch.bool)
    hidden[:, 20:] = hidden[0, 3] = True
    mask = ~hidden[:, None, None]
    ways = [
        {"key_padding": ~hidden},
        {"mask": mask},
        {"mask": torch.where(mask, 0.5, -torch.inf)},
        {"mask": mask, "causal": True},
        {"key_padding": ~hidden, "window": (6, 6)},
    ]
    for arguments in ways:
        results = []
        for masked_value in (0.0, *NON_FINITE):
            q, k, v = qkv(*sizes)
            (k if where == "key" else v).masked_fill_(hidden[:, None, :, None], masked_value)
            leaves = [t.requires_grad_() for t in (q, k, v)]
            out = fastlm.attention(*leaves, backend=backend, **arguments)
            results.append((out.detach(), *torch.autograd.grad(out, leaves, floats(*out.shape))))
        for other in results[1:]:
            for a, b in zip(other, results[0], strict=True):
                torch.testing.assert_close(a, b)


@on_every_backend
@pytest.mark.parametrize("where", ["key", "value"])
def test_causal_masks_a_nan_from_earlier_queries(where, backend):
    q, k, v = qkv(1, 2, 2, 40, 40, 8)
    clean = fastlm.attention(q, k, v, causal=True, backend=backend)
    (k if where == "key" else v)[:, :, 30] = torch.nan
    out = fastlm.attention(q, k, v, causal=True, backend=backend)
    torch.testing.assert_close(out[:, :, :30], clean[:, :, :30])
    assert out[:, :, 30:].isnan().all()


@on_every_backend
def test_an_unmasked_nan_reaches_the_result(backend):
    for which in range(3):
        inputs = list(qkv(1, 1, 1, 6, 6, 8))
        inputs[which][0, 0, 2, 3] = torch.nan
        isnan = fastlm.attention(*inputs, backend=backend).isnan()
        expected = [isnan[0, 0, 2].all(), isnan.all(), isnan[..., 3].all()][which]
        assert expected and (which == 1 or not isnan.all())


@on_every_backend
@pytest.mark.parametrize("value", NON_FINITE, ids=str)
def test_rows_of_non_finite_scores_are_nan(value, backend):
    """Such a row is not a fully masked one. Differences of infinite scores are NaN."""
    q, k, v = (x.abs() for x in qkv(1, 2, 1, 5, 5, 8))
    out = fastlm.attention(q, torch.full_like(k, abs(value)), v, backend=backend)
    assert out.isnan().all()
    k[:, :, 0] = abs(value)
    assert fastlm.attention(q, k, v, causal=True, backend=backend).isnan().all()


@on_every_backend
def test_finfo_min_is_an_ordinary_number(backend):
    """Where a whole row of the mask has this value, the weights are uniform, as in PyTorch."""
    q, k, v = qkv(1, 1, 1, 5, 7, 8)
    mask = torch.zeros(1, 1, 5, 7)
    mask[0, 0, 2] = torch.finfo(torch.float32).min
    mask[0, 0, 3, 4:] = torch.finfo(torch.float32).min
    out = fastlm.attention(q, k, v, mask=mask, backend=backend)
    torch.testing.assert_close(out[0, 0, 2], v[0, 0].mean(0))
    torch.testing.assert_close(out, torch_own()(q, k, v, mask))


@on_every_backend
def test_huge_scores_do_not_overflow(backend):
    q, k, v = qkv(1, 1, 1, 8, 50, 16)
    torch.testing.assert_close(fastlm.attention(q * 1e4, k * 1e3, v, backend=backend), torch_own()(q * 1e4, k * 1e3, v))


@on_every_backend
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0, 0.0, -0.3])
def test_scale(scale, causal, backend):
    assert_within_twice_torch(
        lambda *t: fastlm.attention(*t, scale=scale, causal=causal, backend=backend),
        torch_own(seen(9, 9, causal) if causal else None, scale=scale),
        qkv(1, 2, 2, 9, 9, 16),
        torch.float32,
    )


@on_every_backend
@pytest.mark.parametrize("sizes", [(0, 2, 2, 3, 4, 8), (2, 2, 2, 0, 4, 8), (2, 2, 2, 3, 0, 8)], ids=str)
def test_empty_inputs(sizes, backend):
    leaves = [t.requires_grad_() for t in qkv(*sizes)]
    out = fastlm.attention(*leaves, causal=True, backend=backend)
    assert out.shape == (sizes[0], sizes[1], sizes[3], sizes[5]) and not out.any()
    assert all(
        d.shape == x.shape and not d.any() for d, x in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True)
    )


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_strided_inputs_give_the_same_results(dtype, backend):
    """Views of a packed projection, expanded heads and gradients, and strided heads, against contiguous copies."""
    batch, heads, length, head_dim = 2, 3, 11, 16
    packed = floats(batch, length, 3, heads, head_dim).to(dtype)
    views = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    one = floats(batch, 1, length, head_dim).to(dtype).expand(batch, heads, length, head_dim)
    strided = floats(batch, heads, head_dim, length).to(dtype).transpose(2, 3)
    mask = floats(length, length, 1, batch).permute(3, 2, 1, 0)
    upstreams = (
        floats(batch, heads, length, head_dim).to(dtype),
        torch.ones((), dtype=dtype).expand(batch, heads, length, head_dim),
    )
    for inputs in (
        views,
        (views[0], one, one),
        (strided, views[1], strided),
        (views[2], floats(3, 1, length, 16).to(dtype)[::2], strided[:, :1]),
    ):
        results = []
        for variant, m, is_strided in (
            (inputs, mask, True),
            ([t.contiguous() for t in inputs], mask.contiguous(), False),
        ):
            leaves = [t.detach().requires_grad_() for t in variant]
            out = fastlm.attention(*leaves, mask=m, backend=backend)
            dys = [dy if is_strided else dy.contiguous() for dy in (*upstreams, strided)]
            results.append(
                (out.detach(), *(d for dy in dys for d in torch.autograd.grad(out, leaves, dy, retain_graph=True)))
            )
        for a, b in zip(*results, strict=True):
            # PyTorch's order of additions depends on the strides.
            assert error(a, b.double()) <= {torch.float32: 2**-18, torch.bfloat16: 2**-7}[dtype]
        if backend == "cpu":
            assert_same_bits(*results)


@on_every_backend
@pytest.mark.parametrize("sizes", [(2, 3, 1, 7, 9, 8), (1, 1, 1, 5, 5, 3)], ids=str)
def test_merging_heads_is_a_view(sizes, backend):
    leaves = [t.requires_grad_() for t in qkv(*sizes)]
    out = fastlm.attention(*leaves, backend=backend)
    merged = out.transpose(1, 2).flatten(2)
    assert merged.data_ptr() == out.data_ptr() and merged.is_contiguous()
    assert all(d.transpose(1, 2).is_contiguous() for d in torch.autograd.grad(out.sum(), leaves))


@on_every_backend
def test_only_needed_gradients_are_returned(backend):
    inputs = qkv(1, 2, 1, 6, 7, 8)
    whole = outputs_and_gradients(lambda *t: fastlm.attention(*t, backend=backend), inputs, torch.float32)[1:]
    for i, expected in enumerate(whole):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        fastlm.attention(*leaves, backend=backend).backward(floats(1, 2, 6, 8))
        torch.testing.assert_close(leaves[i].grad, expected)
        assert all(x.grad is None for j, x in enumerate(leaves) if i != j)


@on_backends("torch", "cpu")  # the reference stores it
def test_the_matrix_of_scores_is_never_stored(backend):
    length = 2048
    leaves = [t.requires_grad_() for t in qkv(1, 1, 1, length, length, 8)]
    fastlm.attention(*leaves, causal=True, backend=backend).sum().backward()
    padding = torch.ones(1, length, dtype=torch.bool)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fastlm.attention(*leaves, causal=True, key_padding=padding, backend=backend).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < length * length  # bytes: a quarter of the float32 scores


def call(**changed):
    q, k, v = qkv(2, 4, 2, 3, 5, 8)
    arguments = {"query": q, "key": k, "value": v} | changed
    return fastlm.attention(**arguments)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"query": floats(4, 3, 8)}, r"query: expected shape \(batch, heads, query_len, head_dim\).*, got \(4, 3, 8\)"),
        ({"query": floats(2, 4, 3, 8).long()}, r"query: expected a floating-point tensor, got torch.int64"),
        (
            {"key": floats(2, 2, 5, 7)},
            r"key: expected shape \(2, num_kv_heads, key_len, 8\), as query, got \(2, 2, 5, 7\)",
        ),
        (
            {"key": floats(3, 2, 5, 8)},
            r"key: expected shape \(2, num_kv_heads, key_len, 8\), as query, got \(3, 2, 5, 8\)",
        ),
        (
            {"key": floats(2, 3, 5, 8), "value": floats(2, 3, 5, 8)},
            r"key: expected a number of heads that divides query's 4, got 3",
        ),
        ({"value": floats(2, 2, 6, 8)}, r"value: expected shape \(2, 2, 5, 8\), as key, got \(2, 2, 6, 8\)"),
        ({"key": floats(2, 2, 5, 8).half()}, r"key: expected torch.float32 on cpu, as query, got torch.float16 on cpu"),
        (
            {"value": floats(2, 2, 5, 8).half()},
            r"value: expected torch.float32 on cpu, as query, got torch.float16 on cpu",
        ),
        (
            {"mask": torch.ones(3, 5, dtype=torch.bool)},
            r"mask: expected 4 dimensions, each 1 or that of \(2, 4, 3, 5\), as query and key, got \(3, 5\)",
        ),
        (
            {"mask": torch.ones(2, 2, 3, 5, dtype=torch.bool)},
            r"mask: expected 4 dimensions, each 1 or that of \(2, 4, 3, 5\), as query and key, got \(2, 2, 3, 5\)",
        ),
        (
            {"mask": torch.ones(1, 1, 3, 5, dtype=torch.int64)},
            r"mask: expected torch.bool, torch.float32 or torch.float32 on cpu, got torch.int64 on cpu",
        ),
        (
            {"key_padding": torch.ones(2, 3, dtype=torch.bool)},
            r"key_padding: expected shape \(2, 5\), \(batch, key_len\) of query and key, got \(2, 3\)",
        ),
        (
            {"key_padding": torch.ones(2, 5)},
            r"key_padding: expected torch.bool on cpu, True = a real token, got torch.float32 on cpu",
        ),
        ({"scale": float("nan")}, r"scale: expected a finite number, got nan"),
        ({"window": (-1, 0)}, r"window: expected \(left, right\), each None or an integer of 0 or more, got \(-1, 0\)"),
        ({"window": 5}, r"window: expected \(left, right\), each None or an integer of 0 or more, got 5"),
        ({"softcap": 0.0}, r"softcap: expected a positive number, got 0.0"),
        ({"softcap": -30}, r"softcap: expected a positive number, got -30.0"),
        ({"softcap": float("nan")}, r"softcap: expected a positive number, got nan"),
        ({"softcap": float("inf")}, r"softcap: expected a positive number, got inf"),
        ({"softcap": "30"}, r"softcap: expected a positive number, got '30'"),
        ({"softcap": True}, r"softcap: expected a positive number, got True"),
        ({"softcap": 1e-39}, r"softcap: expected a number between 1.18e-38 and 3.4e\+38, got 1e-39"),  # 0 in float32
        ({"dropout_p": 1.0}, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
        ({"backend": "gpu"}, r"backend: expected one of cpu, triton, cuda, torch, reference, got 'gpu'"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"dropout_p": 0.1}, "draws other dropout masks than fastlm"),
        ({"return_lse": True}, "has no log-sum-exp of a fully masked row, and no gradient of any"),
        ({"mask": torch.zeros(1, 1, 3, 5, requires_grad=True)}, "gives no gradient of the mask"),
    ],
)
def test_backend_torch_refuses_what_pytorch_computes_differently(changed, reason):
    with pytest.raises(fastlm.Unsupported, match=f"torch {reason}"):
        call(backend="torch", **changed)
    assert call(**changed) is not None  # another backend is selected


def test_backend_torch_supports_a_mask_that_requires_a_gradient_under_no_grad():
    mask = torch.zeros(1, 1, 3, 5, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(call(mask=mask, backend="torch"), call())


@pytest.mark.skipif("cpu" not in BACKENDS, reason="backend cpu is not under test")
def test_the_amx_tile_configuration_of_pytorch_is_preserved():
    """On a CPU with AMX, PyTorch's products configure the tiles of the threads and may rely on that configuration."""
    a, b = floats(50, 70, 1)[..., 0].bfloat16(), floats(70, 30, 1)[..., 0].bfloat16()
    known, (q, k, v) = a @ b, (x.bfloat16() for x in qkv(1, 2, 2, 40, 40, 16))
    for _ in range(3):
        fastlm.attention(q, k, v, backend="cpu")
        assert torch.equal(a @ b, known)
