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
    small_chunks,
    targets,
)

# (shape of target, width, vocab)
SHAPES = [((1,), 1, 1), ((5,), 7, 3), ((2, 9), 48, 101), ((37,), 33, 517), ((), 33, 65), ((3, 1, 4), 16, 64)]


def torch_own(target, **options):
    """PyTorch's loss, which has the dtype of its logits."""

    def loss(x, w, b=None):
        logits = F.linear(x, w, b)
        own = F.cross_entropy(
            logits.flatten(0, -2) if target.dim() else logits, target.flatten() if target.dim() else target, **options
        )
        return own.view(target.shape) if options.get("reduction") == "none" else own

    return loss


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "reduction, label_smoothing, biased",
    [("mean", 0.0, True), ("sum", 0.1, False), ("none", 0.1, True), ("mean", 1.0, False)],
)
@pytest.mark.parametrize("shape, width, vocab", SHAPES, ids=str)
def test_as_close_to_float64_as_torch(
    shape, width, vocab, reduction, label_smoothing, biased, dtype, backend, monkeypatch
):
    small_chunks(monkeypatch, backend, 16 * 4 * vocab)  # of 16 rows, or 8 where a 16-bit copy is stored too
    target = targets(vocab, *shape, ignored=[1] if len(shape) and shape[-1] > 1 else [])
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    assert_within_twice_torch(
        lambda x, w, b=None: fastlm.linear_cross_entropy(x, w, target, b, backend=backend, **options),
        torch_own(target, **options),
        (floats(*shape, width), floats(vocab, width) / width**0.5, *([floats(vocab)] if biased else [])),
        dtype,
    )


@on_every_backend
def test_smoothing_of_a_wide_vocabulary(backend):
    """Its maximum is not among the first logits that are read."""
    vocab = 9000
    w = floats(vocab, 5) + torch.linspace(0, 3, vocab)[:, None]
    assert_within_twice_torch(
        lambda *t: fastlm.linear_cross_entropy(*t, targets(vocab, 2), label_smoothing=0.3, backend=backend),
        torch_own(targets(vocab, 2), label_smoothing=0.3),
        (floats(2, 5).abs(), w),
        torch.float32,
    )


@on_every_backend
def test_smoothing_of_large_logits_that_are_nearly_equal(backend):
    """The loss is log(vocab): a mean of such logits would be off by their rounding."""
    x, w = torch.full((3, 1), 5000.3), torch.ones(999, 1)
    assert_within_twice_torch(
        lambda *t: fastlm.linear_cross_entropy(
            *t, targets(999, 3), reduction="none", label_smoothing=1.0, backend=backend
        ),
        torch_own(targets(999, 3), reduction="none", label_smoothing=1.0),
        (x, w),
        torch.float32,
    )


@on_every_backend
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_loss_is_at_least_float32(dtype, backend):
    if backend in ("cpu", "triton", "cuda") and dtype == torch.float64:
        backend = None
    loss = fastlm.linear_cross_entropy(floats(4, 8).to(dtype), floats(20, 8).to(dtype), targets(20, 4), backend=backend)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.shape == ()


@on_every_backend
def test_any_index_can_be_ignored(backend):
    x, w, b = floats(6, 10), floats(9, 10), floats(9)
    for ignore_index in (0, 3, 8, -1, 1000):
        target = torch.tensor([0, 3, 8, 5, 3, 0])
        if not 0 <= ignore_index < 9:
            target[2] = ignore_index
        for reduction in ("mean", "sum", "none"):
            options = {"reduction": reduction, "ignore_index": ignore_index}
            assert_within_twice_torch(
                lambda x, w, b, t=target, o=options: fastlm.linear_cross_entropy(x, w, t, b, backend=backend, **o),
                torch_own(target, **options),
                (x, w, b),
                torch.float32,
            )


@on_backends("cpu")  # others round its probability and the two parts of its target
def test_one_class_has_no_gradient(backend):
    x = (1000 * floats(3, 5)).requires_grad_()
    loss = fastlm.linear_cross_entropy(x, 1000 * floats(1, 5), targets(1, 3), label_smoothing=0.1, backend=backend)
    assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()


@on_every_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_all_rows_ignored(label_smoothing, backend):
    """As in PyTorch, the mean over no rows is NaN and its gradient is 0."""
    target = torch.full((4,), -100)
    for reduction, expected in (
        ("mean", torch.tensor(torch.nan)),
        ("sum", torch.tensor(0.0)),
        ("none", torch.zeros(4)),
    ):
        leaves = [floats(4, 6).requires_grad_(), floats(7, 6).requires_grad_(), floats(7).requires_grad_()]
        loss = fastlm.linear_cross_entropy(
            leaves[0],
            leaves[1],
            target,
            leaves[2],
            reduction=reduction,
            label_smoothing=label_smoothing,
            backend=backend,
        )
        torch.testing.assert_close(loss.detach(), expected, equal_nan=True)
        assert all(
            torch.equal(d, torch.zeros_like(x))
            for d, x in zip(torch.autograd.grad(loss.sum(), leaves), leaves, strict=True)
        )


@on_every_backend
def test_no_rows(backend):
    leaves = [torch.empty(0, 6).requires_grad_(), floats(7, 6).requires_grad_(), floats(7).requires_grad_()]
    target = torch.empty(0, dtype=torch.int64)
    loss = fastlm.linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], reduction="sum", backend=backend)
    assert loss == 0 and not any(d.any() for d in torch.autograd.grad(loss, leaves))
    assert fastlm.linear_cross_entropy(*leaves[:2], target, backend=backend).isnan()
    assert fastlm.linear_cross_entropy(*leaves[:2], target, reduction="none", backend=backend).shape == (0,)


@on_every_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_logit_of_another_token_that_is_not_finite(value, backend):
    """The loss of every row is PyTorch's: NaN, or for −∞ that without the token."""
    bias, target = floats(30).index_fill(0, torch.tensor([7]), value), torch.tensor([1, 2, 3])
    x, w = floats(3, 8), floats(30, 8)
    expected = F.cross_entropy(F.linear(x, w, bias), target, reduction="none")
    for reduction, wanted in (("none", expected), ("sum", expected.sum())):
        leaf = x.clone().requires_grad_()
        loss = fastlm.linear_cross_entropy(leaf, w, target, bias, reduction=reduction, backend=backend)
        without = fastlm.linear_cross_entropy(x, w, target, bias, reduction=reduction, backend=backend)
        torch.testing.assert_close((loss.detach(), without), (wanted, wanted), equal_nan=True)
        gradient = torch.autograd.grad(loss.sum(), leaf)[0]
        assert gradient.isnan().all() if value != -torch.inf else gradient.isfinite().all()


@on_every_backend
def test_confident_and_huge_logits(backend):
    """A probability that underflows float32 still has a finite loss, and one of 1 has loss 0."""
    x, w = torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([[3000.0], [0.0], [-3000.0]])
    target = torch.tensor([2, 2, 1])
    losses = fastlm.linear_cross_entropy(x, w, target, reduction="none", backend=backend)
    torch.testing.assert_close(
        losses, torch.tensor([6000.0, 0.0, 3.0]).where(torch.arange(3) < 2, torch.tensor(3.0).log())
    )


@on_every_backend
def test_the_loss_of_a_nearly_certain_target_is_accurate(backend):
    gap = torch.tensor([2.0, 5.0, 9.0, 14.0])
    x, w = gap[:, None], torch.tensor([[2.0], [1.0], [1.0]])  # log-sum-exp is 10⁸ times the last loss
    losses = fastlm.linear_cross_entropy(x, w, torch.zeros(4, dtype=torch.int64), reduction="none", backend=backend)
    # log(1 + tiny) itself is rounded to 2⁻²⁴.
    expected = torch.log1p(2 * torch.exp(-gap.double()))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=2**-24)


@on_every_backend
def test_chunking_changes_no_result(backend, monkeypatch):
    inputs, target = (floats(40, 24), floats(90, 24), floats(90)), targets(90, 40, ignored=[3, 17])

    def run():
        loss = lambda x, w, b: fastlm.linear_cross_entropy(x, w, target, b, backend=backend)  # noqa: E731
        return outputs_and_gradients(loss, inputs, torch.float32)

    whole = run()
    for rows in (1, 7, 39):
        small_chunks(monkeypatch, backend, rows * 4 * 90)
        for a, b in zip(run(), whole, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_backends("triton", "cuda")
def test_rows_of_logits_are_aligned_for_any_vocabulary(dtype, backend, monkeypatch):
    """The vendor's GEMM wants it: with an odd vocabulary (GPT-2's is 50257) only the first row would be aligned."""
    strides, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *t, out: (strides.append(out.stride()), addmm(*t, out=out))[1])
    small_chunks(monkeypatch, backend, 16 * 4 * 257)
    inputs, target = (floats(40, 12), floats(257, 12), floats(257)), targets(257, 40, ignored=[3])
    assert_within_twice_torch(
        lambda *t: fastlm.linear_cross_entropy(*t[:2], target, t[2], backend=backend), torch_own(target), inputs, dtype
    )
    assert len(strides) > 1 and all(row * dtype.itemsize % 128 == 0 and row >= 257 and one == 1 for row, one in strides)


@on_backends("torch", "cpu", "triton", "cuda")  # the reference stores all logits
def test_never_more_than_one_chunk_of_logits(backend, monkeypatch):
    rows, width, vocab, chunk = 400, 8, 1000, 16
    small_chunks(monkeypatch, backend, chunk * vocab * 4)
    leaves = [floats(rows, width).bfloat16().requires_grad_(), floats(vocab, width).bfloat16().requires_grad_()]
    fastlm.linear_cross_entropy(*leaves, targets(vocab, rows), backend=backend).backward()  # allocates caches
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fastlm.linear_cross_entropy(*leaves, targets(vocab, rows), backend=backend).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert chunk * vocab <= largest <= chunk * vocab * 4  # the largest allocation is the chunk


@on_every_backend
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_can_run_twice(dtype, scale, backend):
    """The gradients were computed in the forward pass, and each backward must return tensors of its own."""
    leaves = [t.to(dtype).requires_grad_() for t in (floats(6, 10), floats(9, 10), floats(9))]
    loss = fastlm.linear_cross_entropy(leaves[0], leaves[1], targets(9, 6), leaves[2], backend=backend) * scale
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [d.clone() for d in first]
    for d in first:
        d.zero_()
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_same_bits(second, kept)
    third = torch.autograd.grad(loss * 3, leaves)
    for a, b in zip(third, kept, strict=True):
        torch.testing.assert_close(a, b * 3, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@on_every_backend
def test_gradients_accumulate(backend):
    """As in a loop over micro-batches."""
    x, w = floats(6, 10), floats(9, 10)
    leaf = w.clone().requires_grad_()
    for part in (x[:3], x[3:]):
        (fastlm.linear_cross_entropy(part, leaf, targets(9, 3), backend=backend) / 2).backward()
    expected = w.clone().requires_grad_()
    for part in (x[:3], x[3:]):
        (F.cross_entropy(part @ expected.t(), targets(9, 3)) / 2).backward()
    torch.testing.assert_close(leaf.grad, expected.grad)


@on_backends("reference", "torch", "cpu")  # it does not depend on the backend, and 4096 rows are slow in an interpreter
def test_float16_gradients_do_not_underflow_under_a_gradient_scaler(backend):
    """1 / count is 2⁻¹² and the gradients of the mean are about 2⁻³⁰, which is 0 in float16 unless scaled first."""
    rows, scale = 4096, 2.0**14
    x, w, target = floats(rows, 2) * 2**-6, floats(3, 2) * 2**-6, targets(3, rows)
    leaf = x.half().requires_grad_()
    (fastlm.linear_cross_entropy(leaf, w.half(), target, backend=backend) * scale).backward()
    truth = x.half().double().requires_grad_()
    (F.cross_entropy(truth @ w.half().double().t(), target) * scale).backward()
    assert error(leaf.grad, truth.grad) < 2**-9


@on_every_backend
def test_only_needed_gradients_are_returned(backend):
    inputs, target = (floats(6, 10), floats(9, 10), floats(9)), targets(9, 6)
    whole = outputs_and_gradients(
        lambda x, w, b: fastlm.linear_cross_entropy(x, w, target, b, backend=backend), inputs, torch.float32
    )[1:]
    for i, expected in enumerate(whole):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        fastlm.linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], backend=backend).backward(floats())
        torch.testing.assert_close(leaves[i].grad, expected)
        assert all(x.grad is None for j, x in enumerate(leaves) if i != j)


@on_every_backend
def test_strided_inputs_give_the_same_results(backend):
    x, w, b, target = floats(8, 24), floats(20, 24), floats(20), targets(20, 8)
    variants = [
        (floats(8, 60)[:, 5:29], w, b, target),
        (floats(24, 8).t(), w, b, targets(20, 16)[::2]),
        (x[:1].expand(8, 24), floats(24, 20).t(), floats(40)[::2], target[:1].expand(8)),
        (x, floats(20, 48)[:, ::2], b, target),
        (floats(4, 2, 24).transpose(0, 1), w, b, targets(20, 4, 2).t()),
    ]
    for variant in variants:
        for reduction in ("mean", "none"):
            results = []
            for inputs in (variant, [t.contiguous() for t in variant]):
                leaves = [t.detach().requires_grad_() for t in inputs[:3]]
                loss = fastlm.linear_cross_entropy(
                    leaves[0], leaves[1], inputs[3], leaves[2], reduction=reduction, backend=backend
                )
                results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
            for a, c in zip(*results, strict=True):
                torch.testing.assert_close(a, c)
            if backend == "cpu":
                assert_same_bits(*results)


@on_every_backend_that_raises
@pytest.mark.parametrize("bad, position", [(7, 0), (-1, 5), (2**40, 3), (-(2**63), 2)])
def test_a_target_out_of_range_is_named(bad, position, backend):
    target = targets(7, 2, 3, ignored=[1])
    target.view(-1)[position] = bad
    expected = r"target: expected values in \[0, 7\), the vocabulary, or ignore_index -100"
    message = rf"{expected}, got {bad} at \[{position // 3}, {position % 3}\]"
    for needs_gradient in (False, True):
        x = floats(2, 3, 4).requires_grad_(needs_gradient)
        with pytest.raises(ValueError, match=message):
            fastlm.linear_cross_entropy(x, floats(7, 4), target, backend=backend)


@pytest.mark.skipif(
    torch.get_default_device().type != "cpu", reason="a device assert ends the process: tests/kernels/test_gpu.py"
)
@on_backends("triton", "cuda")
@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("bad", [7, -1, 2**40, -(2**63), -99])
def test_a_target_out_of_range_is_a_device_assert(bad, needs_gradient, backend, monkeypatch):
    """Without the check before the launch."""
    module = implementation_module("linear_cross_entropy", backend)
    monkeypatch.setattr(module, "check_targets", lambda *arguments: None)
    x, weight, target = floats(6, 4).requires_grad_(needs_gradient), floats(7, 4), targets(7, 6, ignored=[1])
    target[4] = bad
    messages = {
        "triton": "target: expected values in",
        "cuda": "assertion failed: target >= 0 && target < vocab",
    }
    with pytest.raises(Exception, match=messages[backend]):
        fastlm.linear_cross_entropy(x, weight, target, backend=backend)
    target[4] = 6
    # The failed launch left no state behind.
    assert fastlm.linear_cross_entropy(x, weight, target, backend=backend).isfinite()


def gemma_own(target, token_weight=None, logit_scale=1.0, softcap=None, reduction="mean", label_smoothing=0.0):
    """The loss in PyTorch's operators, with weights of tokens and transformed logits."""

    def loss(x, w, b=None):
        logits = F.linear(x, w, b) * logit_scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        options = {"label_smoothing": label_smoothing, "reduction": "none"}
        losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options).view(target.shape)
        weights = torch.ones_like(losses) if token_weight is None else token_weight.to(losses.dtype)
        if reduction == "none":
            return losses * weights
        total = (losses * weights).sum()
        return total / (weights * (target != -100)).sum() if reduction == "mean" else total

    return loss


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 30.0},
        {"softcap": 1.5, "reduction": "sum", "label_smoothing": 0.1},
        {"logit_scale": 0.25},
        {"logit_scale": 4.0, "softcap": 5.0, "reduction": "none"},
    ],
    ids=str,
)
def test_transformed_logits_are_as_close_to_float64_as_torch(options, biased, dtype, backend, monkeypatch):
    """Gemma 2's cap and the scale of Cohere and Granite; the cap saturates some of the logits."""
    rows, vocab = 37, 517
    small_chunks(monkeypatch, backend, 16 * 4 * vocab)
    target = targets(vocab, rows, ignored=[1])
    assert_within_twice_torch(
        lambda x, w, b=None: fastlm.linear_cross_entropy(x, w, target, b, backend=backend, **options),
        gemma_own(target, **options),
        (floats(rows, 33), 2 * floats(vocab, 33) / 33**0.5, *([floats(vocab)] if biased else [])),
        dtype,
    )


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_tokens_are_as_close_to_float64_as_torch(reduction, dtype, backend, monkeypatch):
    small_chunks(monkeypatch, backend, 16 * 4 * 101)
    target, token_weight = targets(101, 2, 19, ignored=[3]), floats(2, 38).abs()[:, ::2]
    token_weight[0, 3], token_weight[1, 2] = torch.nan, 0  # of the ignored row, and of one that does not count
    exact = token_weight.nan_to_num()
    options = {"reduction": reduction, "label_smoothing": 0.1}
    assert_within_twice_torch(
        lambda x, w, b: fastlm.linear_cross_entropy(
            x, w, target, b, token_weight=token_weight, backend=backend, **options
        ),
        gemma_own(target, exact, **options),
        (floats(2, 19, 48), floats(101, 48) / 7, floats(101)),
        dtype,
    )


@on_every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_weights_of_tokens(reduction, backend):
    target, options = targets(31, 12, ignored=[2]), {"reduction": reduction, "softcap": 4.0}

    def ours(x, w, token_weight):
        return fastlm.linear_cross_entropy(x, w, target, token_weight=token_weight, backend=backend, **options)

    def own(x, w, token_weight):
        return gemma_own(target, token_weight, **options)(x, w)

    assert_within_twice_torch(ours, own, (floats(12, 10), floats(31, 10), floats(12).abs() + 0.1), torch.float32)


@on_every_backend
def test_equal_weights_of_tokens_change_no_mean(backend):
    x, w, target = floats(12, 10).requires_grad_(), floats(9, 10).requires_grad_(), targets(9, 12, ignored=[2])
    results = []
    for token_weight in (None, torch.full((12,), 0.25), torch.full((12,), 4.0, dtype=torch.bfloat16)):
        loss = fastlm.linear_cross_entropy(x, w, target, token_weight=token_weight, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, (x, w))))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@on_every_backend
def test_weights_of_tokens_that_are_all_zero(backend):
    """As with weights of classes in PyTorch, the mean is NaN. Its gradient is 0."""
    x, w, target = floats(4, 6).requires_grad_(), floats(7, 6).requires_grad_(), targets(7, 4)
    loss = fastlm.linear_cross_entropy(x, w, target, token_weight=torch.zeros(4), backend=backend)
    assert loss.isnan() and not any(d.any() for d in torch.autograd.grad(loss, (x, w)))


@on_every_backend
def test_a_capped_loss_of_huge_logits(backend):
    """Capped logits of ±softcap have no gradient, and −inf is capped too."""
    x, target = torch.tensor([[1.0], [-1.0]]).requires_grad_(), torch.tensor([2, 0])
    w, bias = torch.tensor([[3e4], [0.0], [-3e4]]), torch.tensor([0.0, -torch.inf, 0.0])
    options = {"softcap": 3.0, "reduction": "none", "backend": backend}
    losses = fastlm.linear_cross_entropy(x, w, target, bias, **options)
    expected = torch.logsumexp(torch.tensor([3.0, -3.0, -3.0]), 0) + 3
    torch.testing.assert_close(losses, expected.expand(2))
    assert not torch.autograd.grad(losses.sum(), x)[0].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@on_backends("reference", "torch", "cpu")
def test_transformed_losses_can_be_differentiated_twice(reduction, backend):
    target, token_weight = targets(5, 4, ignored=[1]), torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64)
    options = {"token_weight": token_weight, "logit_scale": 1.5, "softcap": 2.0, "reduction": reduction}
    leaves = [t.double().requires_grad_() for t in (floats(4, 3), floats(5, 3), floats(5))]

    def loss(x, w, b):
        return fastlm.linear_cross_entropy(x, w, target, b, **options, backend=backend if backend != "cpu" else None)

    assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradgradcheck(loss, leaves)


@on_every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transformed_losses_compiled(reduction, backend):
    torch._dynamo.reset()
    target, token_weight = targets(40, 9, ignored=[1]), floats(9).abs()
    options = {"logit_scale": 1.5, "softcap": 2.0, "reduction": reduction, "backend": backend}

    def run(function):
        leaves = [t.requires_grad_() for t in (floats(9, 24), floats(40, 24), floats(40))]
        loss = function(leaves[0], leaves[1], target, leaves[2], token_weight=token_weight, **options)
        return loss, *torch.autograd.grad(loss.sum(), leaves)

    compiled = torch.compile(fastlm.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(fastlm.linear_cross_entropy))


@on_backends("torch", "cpu", "triton", "cuda")  # the reference stores all logits
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_frozen_weight_gets_no_gradient(reduction, backend, monkeypatch):
    """Neither its product nor its memory: the largest allocation is a chunk of logits, smaller than the weight."""
    rows, width, vocab, chunk = 32, 200, 500, 16
    small_chunks(monkeypatch, backend, chunk * vocab * 4)
    x, weight, target = floats(rows, width).requires_grad_(), floats(vocab, width), targets(vocab, rows)

    def run():
        fastlm.linear_cross_entropy(x, weight, target, reduction=reduction, backend=backend).sum().backward()

    run()  # allocates caches
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= chunk * vocab * 4 < weight.nbytes and weight.grad is None
    with FlopCounterMode(display=False) as counter:
        run()
    logits = 2 * rows * width * vocab
    assert counter.get_total_flops() == logits * (2 if reduction == "mean" else 3)


def call(**changed):
    arguments = {"x": floats(2, 5), "weight": floats(7, 5), "target": targets(7, 2), "bias": floats(7)} | changed
    return fastlm.linear_cross_entropy(**arguments)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.empty(2, 0)}, r"x: expected at least one dimension, the last of size 1 or more, got \(2, 0\)"),
        ({"weight": floats(5, 7)}, r"weight: expected shape \(out, 5\).*, got \(5, 7\)"),
        ({"weight": floats(7, 5).half()}, r"weight: expected torch.float32 on cpu, as x, got torch.float16 on cpu"),
        ({"target": targets(7, 3)}, r"target: expected shape \(2,\), x's without its last dimension, got \(3,\)"),
        ({"target": targets(7, 2).int()}, r"target: expected torch.int64 on cpu, got torch.int32 on cpu"),
        (
            {"target": floats(2, 7)},
            r"target: expected class indices in int64 \(class probabilities are not supported\), got torch.float32",
        ),
        ({"bias": floats(5)}, r"bias: expected shape \(7,\), the vocabulary of weight, got \(5,\)"),
        ({"bias": floats(7).half()}, r"bias: expected torch.float32 on cpu, as x, got torch.float16 on cpu"),
        ({"reduction": "avg"}, r"reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
        ({"label_smoothing": 1.5}, r"label_smoothing: expected a share in \[0, 1\], got 1.5"),
        ({"label_smoothing": float("nan")}, r"label_smoothing: expected a share in \[0, 1\], got nan"),
        ({"softcap": 0.0}, r"softcap: expected a positive number, got 0.0"),
        ({"softcap": -30}, r"softcap: expected a positive number, got -30"),
        ({"logit_scale": 0.0}, r"logit_scale: expected a positive number, got 0.0"),
        ({"logit_scale": float("inf")}, r"logit_scale: expected a positive number, got inf"),
        ({"logit_scale": None}, r"logit_scale: expected a positive number, got None"),
        ({"token_weight": floats(3)}, r"token_weight: expected shape \(2,\), that of target, got \(3,\)"),
        ({"token_weight": torch.ones(2).long()}, r"token_weight: expected a floating-point tensor, got torch.int64"),
        ({"token_weight": 1.0}, r"token_weight: expected a tensor, got 1.0"),
        ({"backend": "gpu"}, r"backend: expected one of cpu, triton, cuda, torch, reference, got 'gpu'"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)
