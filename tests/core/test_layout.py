import torch

import fastlm
from fastlm.core import layout
from tests.support import floats, on_backends


def copies(function):
    before = layout.copies.total()
    result = function()
    return layout.copies.total() - before, result


def test_rows_that_a_stride_describes_are_views():
    for x in (
        floats(4, 6),
        floats(2, 3, 6),
        floats(6),
        floats(8, 10)[:, 2:8],
        floats(4, 3, 6)[:, 1],
        floats(5, 1).expand(5, 1),
        floats(6).expand(4, 6),
    ):
        count, rows = copies(lambda x=x: layout.as_rows(x))
        assert count == 0 and rows.data_ptr() == x.data_ptr() and torch.equal(rows, x.reshape(-1, x.shape[-1]))


def test_other_layouts_are_copied_and_counted():
    for x in (
        floats(6, 4).t(),
        floats(4, 12)[:, ::2],
        floats(3, 2, 6).transpose(0, 1),
        floats(2, 3, 12)[..., ::2],
        torch.ones(()).expand(3, 4),
    ):
        count, rows = copies(lambda x=x: layout.as_rows(x))
        assert count == 1 and rows.stride(-1) == 1 and torch.equal(rows, x.reshape(-1, x.shape[-1]))


def test_rows_and_stride():
    for x in (
        floats(4, 6),
        floats(2, 3, 6),
        floats(6),
        floats(8, 10)[:, 2:8],
        floats(4, 3, 6)[:, 1],
        floats(6, 4).t(),
        floats(3, 2, 6).transpose(0, 1),
    ):
        rows, stride = layout.rows_and_stride(x)
        width = x.shape[-1]
        assert torch.equal(rows.as_strided((x.numel() // width, width), (stride, 1)), x.reshape(-1, width))


def test_three_strides_of_rows():
    """Views of heads are not copied; of tensors of one shape each has its own strides."""
    heads = floats(2, 5, 3, 8).transpose(1, 2)
    for tensors, copied in (
        ((heads, None, heads.contiguous()), 0),
        ((floats(4, 6), floats(4, 6)), 0),
        ((floats(4, 9)[:, 2:8], floats(4, 6)), 0),
        ((floats(6).expand(3, 4, 6), floats(3, 8, 6)[:, ::2]), 0),
        ((floats(2, 3, 4, 5, 6), floats(2, 3, 4, 5, 6)), 0),
        ((floats(2, 3, 4, 10, 6)[:, :, :, ::2], floats(2, 3, 4, 5, 6)), 0),
        ((floats(3, 2, 4, 5, 6).transpose(0, 1), floats(2, 3, 4, 5, 6)), 1),
        ((floats(6, 4).t(), floats(4, 12)[:, ::2]), 2),
        ((floats(12)[::2], floats(6)), 1),
    ):
        count, ((middle, inner), rows) = copies(lambda tensors=tensors: layout.row_strides(*tensors))
        assert count == copied
        for x, (found, *strides) in zip(tensors, rows, strict=True):
            if x is None:
                assert found is None and strides == [0, 0, 0]
                continue
            sizes = x.shape[:-1].numel() // (middle * inner), middle, inner
            assert torch.equal(found.as_strided((*sizes, x.shape[-1]), (*strides, 1)).reshape(x.shape), x)


def test_weights_in_either_layout_are_views():
    for w in (
        floats(5, 7),
        floats(7, 5).t(),
        floats(5, 20)[:, 3:10],
        floats(7, 20)[:, :5].t(),
        floats(5, 1),
        floats(1, 7),
    ):
        count, same = copies(lambda w=w: layout.unit_stride_matrix(w))
        assert count == 0 and same is w
    count, copied = copies(lambda: layout.unit_stride_matrix(floats(5, 14)[:, ::2]))
    assert count == 1 and copied.is_contiguous()


@on_backends("cpu")
def test_a_layer_of_packed_projections_copies_nothing(backend):
    packed = floats(2, 5, 3, 4, 8).requires_grad_()
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    w = floats(32, 32).requires_grad_()

    def layer():
        attended = fastlm.attention(query, key, value, causal=True, backend=backend).transpose(1, 2).flatten(2)
        y, s = fastlm.layernorm_residual(fastlm.linear(attended, w, backend=backend), attended, w[0], backend=backend)
        fastlm.gelu_mlp(y, w, None, w, None, layout="conv1d", backend=backend).backward(s.detach())

    assert copies(layer)[0] == 0


@on_backends("cpu")
def test_info_counts_copies(backend):
    before = fastlm.info().copies.get("strided last dimension", 0)
    fastlm.linear(floats(4, 12)[:, ::2], floats(3, 6), backend=backend)
    assert fastlm.info().copies["strided last dimension"] == before + 1
