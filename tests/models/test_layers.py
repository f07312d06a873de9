import torch
from torch.nn import functional as F

from fastlm.models.layers import Conv1D, Embedding, LayerNorm, Linear, embed, heads_of, joined, loss_and_logits


def filled(module):
    for p in module.parameters():
        torch.nn.init.normal_(p)
    return module


def test_the_two_layouts_of_a_projection():
    x, conv, linear = torch.randn(2, 3, 8), filled(Conv1D(8, 5)), filled(Linear(8, 5))
    torch.testing.assert_close(conv(x), x @ conv.weight + conv.bias)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias))
    assert conv.extra_repr() == "8, 5"


def test_layernorm_gives_the_sum_too():
    norm, x, residual = filled(LayerNorm(8, eps=1e-3)), torch.randn(3, 8), torch.randn(3, 8)
    y, summed = norm(x, residual)
    torch.testing.assert_close(summed, x + residual)
    torch.testing.assert_close(y, F.layer_norm(x + residual, (8,), norm.weight, norm.bias, 1e-3))
    assert torch.equal(norm(x)[1], x)


def test_no_layer_draws_random_numbers_to_throw_away():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    Linear(4, 4), Embedding(4, 4), LayerNorm(4), Conv1D(4, 4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_heads_are_views_and_come_back():
    x = torch.randn(2, 5, 12)
    heads = heads_of(x, 3)
    assert heads.shape == (2, 3, 5, 4) and heads.data_ptr() == x.data_ptr()
    assert torch.equal(joined(heads), x) and joined(heads).data_ptr() == x.data_ptr()


def test_embeddings_by_ids_or_by_place():
    table = filled(Embedding(6, 4))
    assert torch.equal(embed(table, None, slice(2, 4)), table.weight[2:4])
    assert torch.equal(embed(table, torch.tensor([[5, 0]]), slice(2, 4)), table.weight[[5, 0]][None])


def test_loss_and_logits_agree_in_both_modes():
    x, weight, labels = torch.randn(2, 3, 8), torch.randn(11, 8), torch.tensor([[1, -100, 3], [4, 5, -100]])
    loss, logits = loss_and_logits(x, weight, None, labels, training=False)
    fused, none = loss_and_logits(x, weight, None, labels.int(), training=True)
    torch.testing.assert_close(loss, F.cross_entropy((x @ weight.t()).flatten(0, 1), labels.flatten()))
    torch.testing.assert_close(fused, loss)
    assert none is None and loss_and_logits(x, weight, None, None, training=True)[0] is None
    torch.testing.assert_close(logits, x @ weight.t())


def test_the_loss_of_16_bits_is_computed_in_32():
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(11, 8).bfloat16()
    for training in (False, True):
        assert loss_and_logits(x, weight, None, torch.tensor([1, 2, 3]), training)[0].dtype == torch.float32
