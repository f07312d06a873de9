"""Paths of the GPU kernels that the operator tests do not reach.

The alternatives of each launch configuration, tiles of every shape, determinism, and writes out of bounds. They run on
a GPU if there is one, otherwise under the interpreter and in the emulator. test_cuda_*.py has what is specific to the
CUDA kernels.
"""

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.backends import triton as triton_backend
from fastlm.ops.attention import cuda as cuda_attention
from tests.ops.attention import qkv
from tests.support import (
    WITH_TRITON,
    assert_same_bits,
    assert_within_twice_torch,
    error,
    floats,
    on_backends,
    outputs_and_gradients,
)

only_triton = on_backends("triton")
on_gpus = on_backends("triton", "cuda")


@pytest.fixture
def configs():
    pytest.importorskip("triton")
    from fastlm.kernels import configs

    return configs


@pytest.fixture
def architecture(configs, monkeypatch):
    """The name that the backend looks up where these tests run. They change the tables: earlier plans do not hold."""
    from fastlm.kernels import plan

    monkeypatch.setattr(plan, "variant", object())
    name = triton_backend.architecture(torch.cuda.current_device() if torch.cuda.is_available() else None)
    return name


@only_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("approximate, recompute", [("none", 0), ("tanh", 1), ("none", 2)])
def test_the_vendors_product_and_a_pointwise_kernel(
    approximate, recompute, dtype, backend, configs, architecture, monkeypatch
):
    """The alternative to the default of this architecture."""
    at = architecture, dtype.itemsize
    if at in configs.MLP:
        monkeypatch.delitem(configs.MLP, at)
    else:
        monkeypatch.setitem(configs.MLP, at, (64, 64, 32, 4, 2))
    inputs = floats(7, 12), floats(20, 12), floats(20), floats(9, 20), floats(9)
    assert_within_twice_torch(
        lambda *t: fastlm.gelu_mlp(*t, approximate=approximate, recompute=recompute, backend=backend),
        lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2),
        inputs,
        dtype,
    )


@only_triton
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_the_vendors_product_adds_the_bias(layout, backend, configs, architecture, monkeypatch):
    """Its sum is rounded once, and the pointwise kernel reads it and writes the activation alone."""
    from tests.kernels.support import forward

    monkeypatch.delitem(configs.MLP, (architecture, 2), raising=False)
    x, w1, b1, w2 = (floats(*shape).bfloat16() for shape in ((70, 40), (90, 40), (90,), (30, 90)))
    expected = F.linear(x, w1, b1)
    given = (w1, w2) if layout == "linear" else (w1.t().contiguous(), w2.t().contiguous())
    _, hidden, _ = forward("gelu_mlp", backend, x, given[0], b1, given[1], None, "none", layout, 0)
    exact = F.linear(x.double(), w1.double(), b1.double())
    assert error(hidden, exact) <= error(expected, exact)


@only_triton
@pytest.mark.parametrize("n", [1, 12, 15, 16, 17, 40])
def test_pointwise_kernels_of_rows_of_any_width(n, backend, configs, architecture, monkeypatch):
    """Rows narrower than a program, as wide, and wider."""
    from fastlm.kernels import gelu_mlp

    monkeypatch.delitem(configs.MLP, (architecture, 4), raising=False)
    monkeypatch.setattr(gelu_mlp, "BLOCK", 16)
    x, w, b, eye = floats(7, 3), torch.zeros(n, 3), torch.arange(n) + 10.0, torch.eye(n)  # gelu(10) is 10
    out = fastlm.gelu_mlp(x, w, b, eye, None, backend=backend)
    assert torch.equal(out, b.expand(7, n))


@only_triton
@pytest.mark.parametrize(
    "settings", [{}, {"causal": True}, {"window": (9, 4)}, {"causal": True, "softcap": 5.0}], ids=str
)
@pytest.mark.parametrize(
    "shape, copied",
    [((1, 2, 1, 40, 70, 64), True), ((1, 2, 1, 33, 5, 40), True), ((1, 2, 2, 9, 40, 20), False)],
    ids=str,
)
def test_bulk_copies_give_the_same_bits(shape, copied, settings, backend, configs, architecture, monkeypatch):
    """Tiles that cross the end of the keys and of the head; strides that are no multiples of 16 bytes use loads."""
    from fastlm.kernels import attention, plan

    made, of_heads = [], attention.of_heads

    def spy(*arguments):
        made.append(of_heads(*arguments))
        return made[-1]

    monkeypatch.setattr(attention, "of_heads", spy)
    table = configs.table_of(architecture)
    inputs = qkv(*shape)
    results = []
    for copies in (False, True):
        monkeypatch.setattr(plan, "variant", object())
        for which in ("forward", "query"):
            at = f"{which} copies", 2, 64
            monkeypatch.delitem(table, at, raising=False)
            if copies:
                monkeypatch.setitem(table, at, configs.attention_tile(architecture, which, 2, 64, which != "forward"))
        results.append(
            outputs_and_gradients(lambda *t: fastlm.attention(*t, **settings, backend=backend), inputs, torch.bfloat16)
        )
    assert_same_bits(*results)
    assert made and (None not in made) == copied


@pytest.mark.skipif(not WITH_TRITON, reason="needs Triton")
@pytest.mark.parametrize("processors", [82, 108, 132, 304])
@pytest.mark.parametrize("rows, width", [(65536, 768), (65536, 1600), (2**20, 256)])
def test_the_norms_backward_fills_its_waves(rows, width, processors):
    """One, two or four programs run on a multiprocessor at a time: the last wave is not much smaller than the others.

    264 programs would be 1.2 waves of an A100, which runs 216.
    """
    from fastlm.kernels import residual_norm

    tiles = -(-rows // residual_norm.tile(width, False)[0])
    programs, tiles_per_program = residual_norm.partition(rows, width, False, processors)
    assert (programs - 1) * tiles_per_program < tiles <= programs * tiles_per_program
    for at_a_time in (processors, 2 * processors, 4 * processors):
        assert programs / (-(-programs // at_a_time) * at_a_time) > 0.8


@only_triton
@pytest.mark.parametrize("tiles", [(16, 16), (16, 64), (64, 16), (32, 32), (16, 128)], ids=str)
def test_attention_in_tiles_of_any_shape(tiles, backend, configs, architecture, monkeypatch):
    """The edges of the band are in other tiles; the words of dropout cover 16, 32, 64 columns and more."""
    table = {at: (*tiles, *rest[2:]) for at, rest in configs.SMALL.items() if at[0] != "decode"} | {
        at: row for at, row in configs.SMALL.items() if at[0] == "decode"
    }
    inputs = floats(1, 2, 37, 20), floats(1, 1, 70, 20), floats(20, 1, 70, 1).permute(3, 1, 2, 0).contiguous()
    options = {"causal": True, "window": (30, None), "dropout_p": 0.3}

    def seeded(name):
        def attention(*t):
            torch.manual_seed(11)
            return fastlm.attention(*t, **options, backend=name)

        return attention

    expected = outputs_and_gradients(seeded("reference"), inputs, torch.float32)
    monkeypatch.setitem(configs.ATTENTION, architecture, table)
    for a, b in zip(outputs_and_gradients(seeded(backend), inputs, torch.float32), expected, strict=True):
        assert error(a, b.double()) <= 2**-19


@on_gpus
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_with_the_gradient_of_a_mask_all_gradients_are_rounded_once(dtype, backend):
    """Nearly every gradient is the rounded true one. With a 16-bit out, dscores or weights a third would differ."""
    rounded = [
        x.to(dtype)
        for x in (
            floats(1, 2, 40, 20),
            floats(1, 1, 70, 20),
            floats(20, 1, 70, 1).permute(3, 1, 2, 0),
            floats(1, 1, 40, 70),
        )
    ]
    outcomes = []
    for name, wide in ((backend, dtype), ("reference", torch.float64)):
        torch.manual_seed(7)
        leaves = [x.to(wide).requires_grad_() for x in rounded]
        out = fastlm.attention(*leaves[:3], mask=leaves[3], causal=True, dropout_p=0.3, backend=name)
        outcomes.append(torch.autograd.grad(out, leaves, floats(*out.shape).to(dtype).to(wide)))
    for got, truth in zip(*outcomes, strict=True):
        assert (got == truth.to(dtype)).float().mean() > 0.98


def three_splits(backend, monkeypatch):
    """A number of keys with three splits, the last of them short, for two sequences of 4 heads."""
    if backend == "cuda":
        monkeypatch.setattr(cuda_attention, "MIN_SPLIT_SIZE", 64)
        assert all(cuda_attention.splits_of(2, heads, 150) == (64, 3) for heads in (1, 4))
        return 150
    pytest.importorskip("triton")
    from fastlm.kernels import attention_decode

    monkeypatch.setattr(attention_decode, "MIN_SPLIT_SIZE", 32)
    for heads, query_len in ((4, 1), (1, 1), (1, 3)):
        assert attention_decode.serves(4, heads, query_len, 75) and attention_decode.splits_of(2, heads, 75)[1] == 3
    return 75


@on_gpus
@pytest.mark.parametrize("query_len, groups", [(1, 1), (1, 4), (3, 4)])
@pytest.mark.parametrize("masked", ["", "bool", "additive", "padding", "dropout", "fully masked"])
def test_decoding_with_split_k(masked, query_len, groups, backend, monkeypatch):
    """Few queries and several splits, which another kernel combines."""
    key_len = three_splits(backend, monkeypatch)
    q, k, v = (
        floats(2, 4, query_len, 24),
        floats(2, 4 // groups, key_len, 24),
        floats(24, 4 // groups, key_len, 2).permute(3, 1, 2, 0),
    )
    options = {"causal": True, "return_lse": True}
    if masked == "bool":
        options["mask"] = floats(2, 1, query_len, key_len) > 0
    if masked == "additive":
        options["mask"] = torch.where(
            floats(1, 4, query_len, key_len) > 1, -torch.inf, floats(1, 4, query_len, key_len)
        )
    if masked in ("padding", "fully masked"):
        options["key_padding"] = torch.arange(key_len) >= torch.tensor([[40], [5 if masked == "padding" else key_len]])
        k[0, :, 7], v[0, :, 9] = torch.nan, torch.inf  # hidden by the mask
    if masked == "dropout":
        options["dropout_p"] = 0.25
    results = []
    for name in ("reference", backend):
        torch.manual_seed(3)
        results.append(fastlm.attention(q, k, v, **options, backend=name))
    bound = {"triton": 2**-20, "cuda": 2**-18}[backend]  # one multiplies in float32, the other by three tf32 products
    for a, b in zip(results[1], results[0], strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()) and error(a, b.double()) <= bound


@on_gpus
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_visible_nan_reaches_only_where_it_is_visible(which, backend):
    """With a causal mask and a NaN at position 11: the positions of NaN in each result. The others are unchanged."""
    everything, until, since = set(range(20)), set(range(12)), set(range(11, 20))
    # query: its row and its visible keys; key: its queries, and through them all keys; value: likewise, without values
    harmed = [({11}, {11}, until, until), (since, since, everything, everything), (since, since, everything, set())][
        which
    ]
    outcomes = []
    for stands in (torch.nan, 0.0):
        inputs = [
            floats(1, 1, 20, 8),
            floats(1, 1, 20, 8, 1)[..., 0],
            floats(8, 1, 20, 1).permute(3, 1, 2, 0).contiguous(),
        ]
        inputs[which][0, 0, 11, 3] = stands
        leaves = [t.requires_grad_() for t in inputs]
        out = fastlm.attention(*leaves, causal=True, backend=backend)
        outcomes.append((out.detach(), *torch.autograd.grad(out, leaves, floats(*out.shape))))
    for got, clean, wanted in zip(*outcomes, harmed, strict=True):
        assert {i for i in range(20) if got[0, 0, i].isnan().any()} == wanted
        rest = sorted(everything - wanted)
        torch.testing.assert_close(got[0, 0, rest], clean[0, 0, rest])


@on_gpus
@pytest.mark.parametrize("where", ["key", "value"])
def test_dropout_around_a_hidden_nan_is_unchanged(where, backend):
    """Recomputed rows, over more columns than one counter covers, have the same dropout mask."""
    hidden = torch.zeros(1, 80, dtype=torch.bool)
    hidden[0, [5, 70]] = True
    outcomes = []
    for stands in (0.0, torch.nan):
        inputs = [floats(1, 2, 9, 8), floats(1, 1, 80, 8), floats(8, 1, 80, 1).permute(3, 1, 2, 0).contiguous()]
        inputs[1 if where == "key" else 2].masked_fill_(hidden[:, None, :, None], stands)
        leaves = [t.requires_grad_() for t in inputs]
        torch.manual_seed(7)
        out = fastlm.attention(*leaves, key_padding=~hidden, dropout_p=0.5, backend=backend)
        outcomes.append((out.detach(), *torch.autograd.grad(out, leaves, floats(*out.shape))))
    for clean, harmed in zip(*outcomes, strict=True):
        torch.testing.assert_close(harmed, clean)


@on_gpus
def test_the_same_bits_every_time(backend):
    """No sum depends on the order of execution."""
    q, k, v = floats(1, 4, 40, 16), floats(1, 2, 40, 16), floats(16, 2, 40, 1).permute(3, 1, 2, 0)
    bias, x, w, target = floats(1, 4, 40, 40), floats(40, 24), floats(90, 24), torch.arange(40)

    def outcome():
        torch.manual_seed(5)
        leaves = [t.clone().requires_grad_() for t in (q, k, v, bias, x, w)]
        attended = fastlm.attention(*leaves[:3], mask=leaves[3], dropout_p=0.1, backend=backend)
        normed, _ = fastlm.layernorm_residual(leaves[4], leaves[4], w[0], w[1], dropout_p=0.1, backend=backend)
        loss = (
            fastlm.linear_cross_entropy(normed, leaves[5], target, w[:, 0].contiguous(), backend=backend)
            + attended.square().sum()
        )
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    first = outcome()
    for _ in range(2):
        assert_same_bits(outcome(), first)


@on_gpus
def test_float64_and_other_devices_are_refused(backend):
    with pytest.raises(
        fastlm.Unsupported,
        match=rf"{backend} computes in torch.float32, torch.bfloat16, torch.float16, not torch.float64",
    ):
        fastlm.linear(floats(2, 3).double(), floats(4, 3).double(), backend=backend)
