import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from tests.support import (
    DTYPES,
    assert_same_bits,
    assert_within_twice_torch,
    error,
    floats,
    implementation_module,
    on_backends,
    on_every_backend,
    on_every_backend_that_raises,
    outputs_and_gradients,
    set_logits_bytes,
    targets,
)

# (shape of target, width, vocab)
SHAPES = [((1,), 1, 1), ((5,), 7, 3), ((2, 9), 48, 101), ((37,), 33, 517), ((), 33, 65), ((3, 1, 4), 16, 64)]
OPTIONS = [{}, {"temperature": 0.7, "softcap": 2.0}, {"temperature": 3.0}]


def torch_own(target, temperature=1.0, softcap=None, ignore_index=-100):
    """PyTorch's operators; the softmax in float32 at least."""

    def results(x, w, b=None):
        logits = F.linear(x, w, b)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        log_p = torch.log_softmax(logits / temperature, -1)
        ignored = target == ignore_index
        log_prob = log_p.gather(-1, target.masked_fill(ignored, 0)[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        return log_prob.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)

    return results


def small_chunks(monkeypatch, backend, rows, vocab):
    """Chunks of so many rows. Backend torch counts what it derives from the logits too."""
    if backend != "reference":
        module = implementation_module("linear_log_prob", backend)
        set_logits_bytes(monkeypatch, module, rows * 4 * vocab * getattr(module, "COPIES", 1))


def inputs_of(shape, width, vocab, biased=True):
    return floats(*shape, width), floats(vocab, width) / width**0.5, *([floats(vocab)] if biased else [])


def call(target, backend, **options):
    return lambda x, w, b=None: fastlm.linear_log_prob(x, w, target, b, backend=backend, **options)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape, width, vocab", SHAPES, ids=str)
def test_as_close_to_float64_as_torch(shape, width, vocab, biased, options, dtype, backend, monkeypatch):
    small_chunks(monkeypatch, backend, 16, vocab)
    target = targets(vocab, *shape, ignored=[1] if len(shape) and shape[-1] > 1 else [])
    inputs = inputs_of(shape, width, vocab, biased)
    assert_within_twice_torch(call(target, backend, **options), torch_own(target, **options), inputs, dtype)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
@pytest.mark.parametrize("rows, vocab", [(3, 9000), (130, 1100)])
def test_wide_and_many_rows(rows, vocab, order, dtype, backend):
    """The largest logit is found again and again, at once, or once in a while."""
    bias = floats(vocab)
    if order != "random":
        bias = bias.sort(descending=order == "descending").values
    inputs = floats(rows, 8), floats(vocab, 8) / 9, bias
    target = targets(vocab, rows, ignored=[2])
    assert_within_twice_torch(call(target, backend, temperature=0.8), torch_own(target, temperature=0.8), inputs, dtype)


@on_every_backend
def test_logits_at_both_ends_of_float32(backend):
    """Their difference overflows: the larger one has all the weight."""
    x, w = torch.ones(2, 1), torch.full((5000, 1), -3e38)
    w[-1] = 3e38
    leaf = w.clone().requires_grad_()
    log_prob, entropy = call(torch.tensor([4999, 5]), backend)(x, leaf)
    assert log_prob.tolist() == [0.0, -torch.inf] and not entropy.any()
    upstream = [torch.tensor([1.0, 2.0]), torch.ones(2)]
    dw = torch.autograd.grad((log_prob, entropy), leaf, upstream)[0][:, 0]
    expected = torch.zeros(5000).index_put((torch.tensor([5, 4999]),), torch.tensor([2.0, -2.0]))
    assert torch.equal(dw, expected)


@on_every_backend
@pytest.mark.parametrize("which", [0, 1], ids=["log_prob", "entropy"])
def test_gradients_of_one_result_only(which, backend):
    target, inputs = targets(40, 9, ignored=[2]), inputs_of((9,), 24, 40)
    ours = lambda *t: call(target, backend, softcap=2.0)(*t)[which]  # noqa: E731
    own = lambda *t: torch_own(target, softcap=2.0)(*t)[which]  # noqa: E731
    assert_within_twice_torch(ours, own, inputs, torch.float32)


@on_every_backend
def test_a_certain_token_has_no_gradient(backend):
    """With a vocabulary of one, and where the other tokens have no weight."""
    for vocab in (1, 30):
        leaves = [(floats(6, 8).abs() * 30).requires_grad_(), torch.full((vocab, 8), -9.0).requires_grad_()]
        with torch.no_grad():
            leaves[1][0] = 9
        results = call(torch.zeros(6, dtype=torch.int64), backend, temperature=0.3)(*leaves)
        gradients = torch.autograd.grad(results, leaves, [floats(6), floats(6)])
        assert not any(x.any() for x in (*results, *gradients))


@on_every_backend
def test_results_are_float32_and_like_the_target(backend):
    for dtype in DTYPES:
        for result in call(targets(20, 2, 4), backend)(floats(2, 4, 8).to(dtype), floats(20, 8).to(dtype)):
            assert result.dtype == torch.float32 and result.shape == (2, 4) and result.is_contiguous()


def test_float64():
    target, inputs = targets(20, 6), [x.double() for x in inputs_of((6,), 8, 20)]
    ours, own = call(target, None)(*inputs), torch_own(target)(*inputs)
    assert ours[0].dtype == torch.float64
    torch.testing.assert_close(ours, own)


@on_every_backend
def test_huge_logits(backend):
    """Their differences count, not their size; a row with all its weight on one token has entropy 0."""
    x, w = torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([[3e30], [0.0], [-3e30]])
    log_prob, entropy = call(torch.tensor([0, 2, 1]), backend)(x, w)
    torch.testing.assert_close(log_prob, torch.tensor([0.0, 0.0, -(torch.tensor(3.0).log().item())]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, 0.0, torch.tensor(3.0).log().item()]))
    assert not entropy[:2].any()
    shifted = floats(5, 30)
    bias, identity = torch.full((30,), 2.0**20), torch.eye(30)
    rounded = (shifted + bias) - bias
    target = targets(30, 5)
    truth = torch_own(target)(rounded.double(), identity.double())
    for a, b in zip(call(target, backend)(rounded, identity, bias), truth, strict=True):
        assert error(a, b) <= 2**-20


@on_every_backend
def test_small_entropies(backend):
    """Of rows with nearly all the weight on one token."""
    x = torch.tensor([[10.0], [12.0], [15.0], [30.0]])
    w, target = torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([0, 0, 1, 1])
    truth = torch_own(target)(x.double(), w.double())
    for a, b in zip(call(target, backend)(x, w), truth, strict=True):
        assert ((a.double() - b).abs() <= 2**-22 * b.abs() + 2**-23).all() and (a[-1].isfinite()).all()
    assert (call(target, backend)(x, w)[1] >= 0).all()


@on_every_backend
def test_a_certain_token_leaves_the_gradient_of_the_entropy(backend):
    """That of its log-probability is 0, and each of its terms is not."""
    x, w, b = torch.tensor([[20.0]]), torch.tensor([[1.0], [0.0]]), torch.zeros(2, requires_grad=True)
    log_prob, entropy = call(torch.tensor([0]), backend)(x, w, b)
    (of_both,) = torch.autograd.grad((3 * log_prob + entropy).sum(), b, retain_graph=True)
    (of_entropy,) = torch.autograd.grad(entropy.sum(), b)
    assert of_entropy[0] != 0 and of_both[0].item() == pytest.approx(of_entropy[0].item(), rel=1e-3)


@on_every_backend
def test_logits_of_minus_infinity_have_no_weight(backend):
    """As those of tokens that are not allowed: the results are those without them, and their gradient is 0."""
    x, w, bias, target = floats(5, 8), floats(12, 8), floats(12), torch.tensor([0, 3, 7, 7, 1])
    leaves = [t.clone().requires_grad_() for t in (x, w, bias.index_fill(0, torch.tensor([8, 9, 10, 11]), -torch.inf))]
    log_prob, entropy = call(target, backend)(*leaves)
    gradients = torch.autograd.grad([log_prob, entropy], leaves, [floats(5), floats(5) * 2])
    few = [t.clone().requires_grad_() for t in (x, w[:8], bias[:8])]
    expected = call(target, backend)(*few)
    wanted = torch.autograd.grad(expected, few, [floats(5), floats(5) * 2])
    torch.testing.assert_close((log_prob, entropy), expected)
    torch.testing.assert_close(gradients[0], wanted[0])
    for ours, theirs in zip(gradients[1:], wanted[1:], strict=True):
        torch.testing.assert_close(ours[:8], theirs)
        assert not ours[8:].any()
    missed, _ = call(torch.full((5,), 9), backend)(*leaves)
    assert (missed == -torch.inf).all()


@on_every_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_of_another_token_that_is_not_a_number(value, backend):
    """NaN, and +∞ as in PyTorch, whose probability is ∞ / ∞."""
    bias = floats(30).index_fill(0, torch.tensor([7]), value)
    leaf = floats(3, 8).requires_grad_()
    results = call(torch.tensor([1, 2, 3]), backend)(leaf, floats(30, 8), bias)
    gradient = torch.autograd.grad(results, leaf, [floats(3), floats(3)])[0]
    assert all(x.isnan().all() for x in (*results, gradient))


@on_every_backend
def test_nan_stays_in_its_row(backend):
    x, w, target = floats(4, 8).requires_grad_(), floats(40, 8), targets(40, 4)
    with torch.no_grad():
        x[2, 3] = torch.nan
    results = call(target, backend)(x, w)
    gradient = torch.autograd.grad(results, x, [floats(4), floats(4)])[0]
    for result in (*results, gradient):
        assert result[2].isnan().all() and result[[0, 1, 3]].isfinite().all()


@on_every_backend
def test_ignored_rows_have_no_result_and_no_gradient(backend):
    for ignore_index in (-100, 3, 1000):
        target = torch.tensor([3, ignore_index, 5, ignore_index])
        leaves = [floats(4, 8).requires_grad_(), floats(9, 8).requires_grad_()]
        results = call(target, backend, ignore_index=ignore_index)(*leaves)
        dx, _ = torch.autograd.grad(results, leaves, [floats(4), floats(4)])
        ignored = target == ignore_index
        for result in (*results, dx):
            assert not result[ignored].any() and result[~ignored].all()


@on_every_backend
def test_no_rows(backend):
    leaves = [torch.empty(0, 6).requires_grad_(), floats(7, 6).requires_grad_(), floats(7).requires_grad_()]
    results = call(torch.empty(0, dtype=torch.int64), backend)(*leaves)
    assert [tuple(r.shape) for r in results] == [(0,), (0,)]
    gradients = torch.autograd.grad([r.sum() for r in results], leaves)
    assert all(d.shape == x.shape and not d.any() for d, x in zip(gradients, leaves, strict=True))


@on_backends("torch", "cpu", "triton", "cuda")
def test_results_do_not_depend_on_the_chunk(backend, monkeypatch):
    target, inputs = targets(90, 40, ignored=[3, 17]), inputs_of((40,), 24, 90)
    run = lambda: outputs_and_gradients(call(target, backend, softcap=3.0), inputs, torch.float32)  # noqa: E731
    whole = run()
    for rows in (1, 7, 39):
        small_chunks(monkeypatch, backend, rows, 90)
        for a, b in zip(run(), whole, strict=True):
            torch.testing.assert_close(a, b)


@on_backends("torch", "cpu", "triton", "cuda")  # the reference stores all logits
def test_never_more_than_one_chunk_of_logits(backend, monkeypatch):
    rows, width, vocab, chunk = 100, 8, 1000, 16
    small_chunks(monkeypatch, backend, chunk, vocab)
    leaves = [floats(rows, width).bfloat16().requires_grad_(), floats(vocab, width).bfloat16().requires_grad_()]
    target = targets(vocab, rows)

    def run():
        torch.autograd.backward(call(target, backend)(*leaves), [torch.ones(rows), torch.ones(rows)])

    run()  # allocates caches
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= chunk * vocab * 4


@on_every_backend
def test_only_needed_gradients_are_returned(backend):
    target, inputs = targets(9, 6), inputs_of((6,), 10, 9)
    whole = outputs_and_gradients(call(target, backend), inputs, torch.float32)[2:]
    for i, expected in enumerate(whole):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        torch.autograd.backward(call(target, backend)(*leaves), [floats(6), floats(6)])
        torch.testing.assert_close(leaves[i].grad, expected)
        assert all(x.grad is None for j, x in enumerate(leaves) if i != j)


@on_every_backend
def test_a_frozen_weight_costs_no_product(backend):
    rows, width, vocab = 6, 10, 9
    for frozen, products in ((False, 4), (True, 3)):
        x, w = floats(rows, width).requires_grad_(), floats(vocab, width).requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counted:
            torch.autograd.backward(call(targets(vocab, rows), backend)(x, w), [floats(rows), floats(rows)])
        assert counted.get_total_flops() == products * 2 * rows * width * vocab


@on_every_backend
def test_strided_inputs_give_the_same_results(backend):
    x, w, b, target = floats(8, 24), floats(20, 24), floats(20), targets(20, 8)
    for variant in (
        (floats(8, 60)[:, 5:29], w, b, target),
        (floats(24, 8).t(), w, b, targets(20, 16)[::2]),
        (x[:1].expand(8, 24), floats(24, 20).t(), floats(40)[::2], target[:1].expand(8)),
        (x, floats(20, 48)[:, ::2], b, target),
        (floats(4, 2, 24).transpose(0, 1), w, b, targets(20, 4, 2).t()),
    ):
        results = []
        for inputs in (variant, [t.contiguous() for t in variant]):
            leaves = [t.detach().requires_grad_() for t in inputs[:3]]
            both = fastlm.linear_log_prob(leaves[0], leaves[1], inputs[3], leaves[2], backend=backend)
            upstream = [torch.ones(()).expand(r.shape) for r in both]
            results.append([*(r.detach() for r in both), *torch.autograd.grad(both, leaves, upstream)])
        for a, c in zip(*results, strict=True):
            torch.testing.assert_close(a, c)


@on_backends("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_every_thread_count(dtype, backend):
    target, threads, results = targets(501, 70), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(call(target, backend), inputs_of((70,), 24, 501), dtype))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_it_is_the_negative_loss_of_linear_cross_entropy():
    target, (x, w, b) = targets(101, 2, 9, ignored=[3]), inputs_of((2, 9), 48, 101)
    loss = fastlm.linear_cross_entropy(x, w, target, b, softcap=3.0, reduction="none")
    torch.testing.assert_close(fastlm.linear_log_prob(x, w, target, b, softcap=3.0)[0], -loss)


@on_every_backend_that_raises
@pytest.mark.parametrize("bad, position", [(7, 0), (-1, 5), (2**40, 3), (-(2**63), 2)])
def test_a_target_out_of_range_is_named(bad, position, backend):
    target = targets(7, 2, 3, ignored=[1])
    target.view(-1)[position] = bad
    expected = r"target: expected values in \[0, 7\), the vocabulary, or ignore_index -100"
    for needs_gradient in (False, True):
        with pytest.raises(ValueError, match=rf"{expected}, got {bad} at \[{position // 3}, {position % 3}\]"):
            call(target, backend)(floats(2, 3, 4).requires_grad_(needs_gradient), floats(7, 4))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.empty(2, 0)}, r"x: expected at least one dimension, the last of size 1 or more, got \(2, 0\)"),
        ({"weight": floats(5, 7)}, r"weight: expected shape \(out, 5\).*, got \(5, 7\)"),
        ({"target": targets(7, 3)}, r"target: expected shape \(2,\), x's without its last dimension, got \(3,\)"),
        ({"target": targets(7, 2).int()}, r"target: expected torch.int64 on cpu, got torch.int32 on cpu"),
        ({"bias": floats(5)}, r"bias: expected shape \(7,\), the vocabulary of weight, got \(5,\)"),
        ({"temperature": 0.0}, r"temperature: expected a positive number, got 0.0"),
        ({"temperature": float("nan")}, r"temperature: expected a positive number, got nan"),
        ({"temperature": 1e-40}, r"temperature: expected a number between 1\.18e-38 and 3\.4e\+38, got 1e-40"),
        ({"temperature": None}, r"temperature: expected a positive number, got None"),
        ({"softcap": -30}, r"softcap: expected a positive number, got -30"),
        ({"ignore_index": 1.5}, r"ignore_index: expected a 64-bit integer, got 1.5"),
        ({"backend": "gpu"}, r"backend: expected one of cpu, triton, cuda, torch, reference, got 'gpu'"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        fastlm.linear_log_prob(**{"x": floats(2, 5), "weight": floats(7, 5), "target": targets(7, 2)} | changed)
