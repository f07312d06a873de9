import statistics

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from fastlm.benchmarking.memory import peak_of_call
from fastlm.ops.contrastive_loss import composition
from tests.support import (
    DTYPES,
    FLOOR,
    SLOW,
    assert_same_bits,
    assert_within_twice_torch,
    error,
    floats,
    on_backends,
    on_every_backend,
    on_every_backend_that_raises,
    outputs_and_gradients,
    targets,
)

# (batch, width, number of negatives); None: no negatives are given
SHAPES = [(1, 1, None), (5, 7, None), (37, 33, 5), (16, 64, 0), (64, 48, 1), (3, 130, 70)]


def torch_own(labels=None, temperature=0.05):
    """PyTorch's operators; the softmax in float32 at least."""

    def loss(queries, documents, negatives=None):
        compared = documents if negatives is None else torch.cat([documents, negatives])
        similarity = F.normalize(queries, dim=-1) @ F.normalize(compared, dim=-1).t()
        logits = similarity.to(torch.promote_types(similarity.dtype, torch.float32)) / temperature
        return F.cross_entropy(logits, torch.arange(len(queries)) if labels is None else labels)

    return loss


def call(backend, **options):
    return lambda q, d, n=None: fastlm.contrastive_loss(q, d, negatives=n, backend=backend, **options)


def inputs_of(batch, width, negatives=None):
    shapes = [(batch, width, 1), (batch, width, 2), *([] if negatives is None else [(negatives, width, 3)])]
    return [floats(*shape)[..., 0].contiguous() for shape in shapes]


def small_chunks(monkeypatch, backend, rows, count):
    """Chunks of so many rows of similarities. The reference computes all at once."""
    if backend != "reference":
        monkeypatch.setattr(composition, "SIMILARITY_BYTES", rows * 4 * count)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("batch, width, negatives", SHAPES)
def test_as_close_to_float64_as_torch(batch, width, negatives, temperature, dtype, backend, monkeypatch):
    small_chunks(monkeypatch, backend, 16, batch + (negatives or 0))
    inputs = inputs_of(batch, width, negatives)
    options = {"temperature": temperature}
    assert_within_twice_torch(call(backend, **options), torch_own(**options), inputs, dtype)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_low_temperature(dtype, backend):
    """It multiplies the rounding of 16-bit similarities, whose effect on one loss is luck: the median counts."""
    generator, options, ratios = torch.Generator().manual_seed(0), {"temperature": 0.01}, []
    for _ in range(3 if backend in SLOW else 15):
        inputs = [torch.randn(n, 33, generator=generator, device="cpu").to(dtype) for n in (37, 37, 5)]
        inputs = [x.to(torch.get_default_device()) for x in inputs]
        truths = outputs_and_gradients(torch_own(**options), [x.double() for x in inputs], torch.float64, dtype)
        both = (
            outputs_and_gradients(function, inputs, dtype)
            for function in (call(backend, **options), torch_own(**options))
        )
        for a, b, truth in zip(*both, truths, strict=True):
            ratios.append(error(a, truth) / (2 * error(b, truth) + FLOOR[dtype]))
    assert statistics.median(ratios) <= 1


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_norms_far_from_1(scale, dtype, backend):
    inputs = [x * scale for x in inputs_of(9, 24, 4)]
    if dtype == torch.float16:  # whose gradients would be beyond its range
        inputs = [x.clamp(-1e3, 1e3) for x in inputs] if scale > 1 else [x * 100 for x in inputs]
    assert_within_twice_torch(call(backend), torch_own(), inputs, dtype)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels(dtype, backend, monkeypatch):
    """Also of negatives, of one document for several queries, and of queries that do not count."""
    small_chunks(monkeypatch, backend, 16, 47)
    labels = targets(47, 40, ignored=[0, 17, 39])
    assert_within_twice_torch(call(backend, labels=labels), torch_own(labels), inputs_of(40, 24, 7), dtype)


@on_every_backend
def test_queries_with_label_minus_100_do_not_count(backend):
    """They have no gradient. Their documents are compared with all the same."""
    leaves = [x.requires_grad_() for x in inputs_of(6, 8)]
    labels = torch.tensor([0, -100, 2, 3, -100, 5])
    loss = fastlm.contrastive_loss(*leaves, labels=labels, backend=backend)
    dqueries, ddocuments = torch.autograd.grad(loss, leaves)
    assert not dqueries[[1, 4]].any() and dqueries[[0, 2, 3, 5]].all() and ddocuments.all()
    counted = labels >= 0
    few = fastlm.contrastive_loss(
        leaves[0][counted], leaves[1][counted], negatives=leaves[1][~counted], backend=backend
    )
    torch.testing.assert_close(loss, few)


@on_every_backend
def test_no_query_counts(backend):
    """As in PyTorch the mean over nothing is NaN; the gradient is 0, as linear_cross_entropy's."""
    leaves = [x.requires_grad_() for x in inputs_of(3, 8)]
    loss = fastlm.contrastive_loss(*leaves, labels=torch.full((3,), -100), backend=backend)
    assert loss.isnan() and not any(d.any() for d in torch.autograd.grad(loss, leaves))


@on_every_backend
@pytest.mark.parametrize("negatives", [None, 0, 3])
def test_no_queries(negatives, backend):
    leaves = [x.requires_grad_() for x in inputs_of(0, 8, negatives)]
    loss = call(backend)(*leaves)
    gradients = torch.autograd.grad(loss, leaves)
    assert loss.isnan() and all(d.shape == x.shape and not d.any() for d, x in zip(gradients, leaves, strict=True))


@on_every_backend
def test_one_query_without_negatives_is_certain(backend):
    leaves = [x.requires_grad_() for x in inputs_of(1, 8)]
    loss = call(backend)(*leaves)
    assert loss == 0 and not any(d.any() for d in torch.autograd.grad(loss, leaves))


@on_every_backend
def test_equal_documents(backend):
    """A duplicate counts twice among the documents, as in PyTorch."""
    queries, documents = inputs_of(6, 8)
    documents[3] = documents[0]
    assert_within_twice_torch(call(backend), torch_own(), [queries, documents], torch.float32)
    same = fastlm.contrastive_loss(queries, documents[:1].expand(6, 8), backend=backend)
    torch.testing.assert_close(same, torch.tensor(6.0).log())


@on_every_backend
@pytest.mark.parametrize("norm", [0.0, 1e-14, 1e-11])
def test_embeddings_of_norm_0(norm, backend):
    """They are divided by 1e-12, as in torch.nn.functional.normalize, and have its gradient."""
    inputs = inputs_of(5, 8, 3)
    for x in inputs:
        x[1] *= norm / x[1].norm()
    assert_within_twice_torch(call(backend), torch_own(), inputs, torch.float32)


@on_every_backend
def test_a_16_bit_embedding_of_norm_0(backend):
    """PyTorch's normalize gives NaN for it in float16, in which 1e-12 is 0."""
    for dtype in DTYPES[1:]:
        inputs = [x.to(dtype) for x in inputs_of(5, 8)]
        inputs[0][1] = 0
        truth = torch_own()(*(x.double() for x in inputs))
        assert error(call(backend)(*inputs), truth) <= 2**-7


@on_every_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_no_numbers(value, backend):
    """One query makes the loss NaN and with it the gradients of all documents, but not those of other queries."""
    leaves = inputs_of(6, 8)
    leaves[0][2, 3] = value
    leaves = [x.requires_grad_() for x in leaves]
    loss = call(backend)(*leaves)
    dqueries, ddocuments = torch.autograd.grad(loss, leaves)
    others = torch.tensor([0, 1, 3, 4, 5])
    assert loss.isnan() and dqueries[2].isnan().all() and dqueries[others].isfinite().all()
    assert ddocuments.isnan().all()
    queries, documents = inputs_of(6, 8)
    documents[1, 1] = value
    assert call(backend)(queries, documents).isnan()


@on_every_backend
@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e30])
def test_temperatures_at_both_ends(temperature, backend):
    inputs = inputs_of(6, 8, 3)
    options = {"temperature": temperature}
    assert_within_twice_torch(call(backend, **options), torch_own(**options), inputs, torch.float32)


@on_every_backend
def test_float16_gradients_of_a_large_batch_can_be_scaled(backend):
    """The mean divides them by the batch, and a gradient scaler multiplies them before they are rounded."""
    inputs = [x.half() for x in inputs_of(300, 16)]
    options = {"temperature": 5.0}
    scaled = [
        torch.autograd.grad(function(*leaves) * 2.0**15, leaves)
        for function, dtype in ((call(backend, **options), torch.float16), (torch_own(**options), torch.float64))
        for leaves in [[x.to(dtype, copy=True).requires_grad_() for x in inputs]]
    ]
    for a, truth in zip(*scaled, strict=True):
        assert error(a, truth) <= 2**-8


@on_every_backend
def test_the_loss_is_a_float32_scalar(backend):
    for dtype in DTYPES:
        loss = call(backend)(*(x.to(dtype) for x in inputs_of(4, 8)))
        assert loss.dtype == torch.float32 and loss.shape == ()


@on_every_backend
def test_only_needed_gradients_are_computed(backend):
    inputs = inputs_of(6, 10, 4)
    whole = outputs_and_gradients(call(backend), inputs, torch.float32, upstream_factor=2)[1:]
    for i, expected in enumerate(whole):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        (call(backend)(*leaves) * (floats() * 2)).backward()
        torch.testing.assert_close(leaves[i].grad, expected)
        assert all(x.grad is None for j, x in enumerate(leaves) if i != j)
    for needed, products in (((True,) * 3, 3), ((True, False, False), 2), ((False, False, True), 2)):
        leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
        with FlopCounterMode(display=False) as counted:
            call(backend)(*leaves).backward()
        assert counted.get_total_flops() == products * 2 * 6 * 10 * 10


@on_every_backend
def test_backward_can_run_twice(backend):
    leaves = [x.requires_grad_() for x in inputs_of(6, 8, 3)]
    loss = call(backend)(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [d.clone() for d in first]
    for d in first:
        d.zero_()
    assert_same_bits(torch.autograd.grad(loss, leaves), kept)


@on_every_backend
def test_strided_inputs_give_the_same_results(backend):
    for variant in (
        (floats(8, 60)[:, 5:29], floats(24, 8).t(), floats(5, 48)[:, ::2]),
        (floats(16, 24)[::2], floats(24).expand(8, 24), floats(24, 5).t()),
    ):
        results = [
            outputs_and_gradients(call(backend, labels=labels), inputs, torch.float32)
            for inputs, labels in (
                (variant, targets(13, 16)[::2]),
                ([x.contiguous() for x in variant], targets(13, 16)[::2].contiguous()),
            )
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@on_every_backend
def test_queries_that_are_the_documents(backend):
    """As for SimCSE with one view; both paths of the gradient count."""
    x = floats(7, 12)
    ours, own = (
        torch.autograd.grad(function(leaf, leaf), leaf)[0]
        for function in (call(backend), torch_own())
        for leaf in [x.clone().requires_grad_()]
    )
    torch.testing.assert_close(ours, own)


@on_backends("torch", "cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_chunk(dtype, backend, monkeypatch):
    """But for rounding: in 16 bits a backend may round the gradient of every chunk."""
    inputs, labels = inputs_of(70, 24, 9), targets(79, 70, ignored=[3, 17])
    tolerance = {torch.float32: 2**-20, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    run = lambda: outputs_and_gradients(call(backend, labels=labels), inputs, dtype)  # noqa: E731
    whole = run()
    for rows in (16, 32, 64):
        small_chunks(monkeypatch, backend, rows, 79)
        for a, b in zip(run(), whole, strict=True):
            assert error(a, b.double()) <= tolerance


@on_backends("torch", "cpu")
def test_memory_of_a_batch_of_4096(backend):
    """Less than half of a 4096 × 4096 matrix, of which PyTorch's peak has three; and linear in the batch."""
    peaks = []
    for batch in (4096, 8192):
        leaves = [x.requires_grad_() for x in inputs_of(batch, 64)]
        peaks.append(peak_of_call(lambda leaves=leaves: call(backend)(*leaves).backward()))
    assert peaks[0] < 4096 * 4096 * 4 / 2 and peaks[1] <= 2 * peaks[0]


@on_backends("torch", "cpu", "triton", "cuda")
def test_gradients_of_many_chunks_are_summed_in_float32(backend, monkeypatch):
    """The documents' gradient is the sum of those of 40 chunks; one in bfloat16 has more than twice PyTorch's error."""
    small_chunks(monkeypatch, backend, 16, 640)
    queries = floats(640, 24).bfloat16()
    documents = floats(1, 24).bfloat16().expand(640, 24) + floats(640, 24, 1)[..., 0].bfloat16() / 64
    assert_within_twice_torch(call(backend), torch_own(), [queries, documents], torch.bfloat16)


@on_backends("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_every_thread_count(dtype, backend, monkeypatch):
    small_chunks(monkeypatch, backend, 160, 520)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(call(backend), inputs_of(500, 96, 20), dtype))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@on_every_backend_that_raises
@pytest.mark.parametrize("bad", [9, -1, 2**40, -(2**63)])
def test_a_label_out_of_range_is_named(bad, backend, monkeypatch):
    small_chunks(monkeypatch, backend, 16, 27)
    labels, inputs = targets(27, 20), inputs_of(20, 4, 7)
    labels[18] = 18 + bad if bad == 9 else bad
    message = rf"labels: expected values in \[0, 27\), the documents and negatives, or -100, got {labels[18]} at \[18\]"
    for needs_gradient in (False, True):
        with pytest.raises(ValueError, match=message):
            call(backend, labels=labels)(*(x.requires_grad_(needs_gradient) for x in inputs))


def test_autocast_takes_embeddings_of_mixed_dtypes():
    queries, documents = inputs_of(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fastlm.contrastive_loss(queries.bfloat16(), documents)
    torch.testing.assert_close(mixed, fastlm.contrastive_loss(queries.bfloat16(), documents.bfloat16()))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"queries": [1.0]}, r"queries: expected a tensor, got list"),
        ({"documents": None}, r"documents: expected a tensor, got None"),
        ({"negatives": 3}, r"negatives: expected a tensor, got 3"),
        ({"labels": [0, 1]}, r"labels: expected a tensor, got list"),
        ({"queries": floats(5)}, r"queries: expected shape \(batch, width\) with a width of 1 or more, got \(5,\)"),
        ({"queries": floats(2, 0)}, r"queries: expected shape \(batch, width\).*, got \(2, 0\)"),
        ({"queries": floats(2, 5).int()}, r"queries: expected a floating-point tensor, got torch.int32"),
        ({"documents": floats(3, 5)}, r"documents: expected shape \(2, 5\), that of queries, got \(3, 5\)"),
        (
            {"documents": floats(2, 5).half()},
            r"documents: expected torch.float32 on cpu, as queries, got torch.float16 on cpu",
        ),
        ({"negatives": floats(4, 6)}, r"negatives: expected shape \(any, 5\), the width of queries, got \(4, 6\)"),
        ({"negatives": floats(5)}, r"negatives: expected shape \(any, 5\), the width of queries, got \(5,\)"),
        (
            {"negatives": floats(4, 5).double()},
            r"negatives: expected torch.float32 on cpu, as queries, got torch.float64",
        ),
        ({"labels": targets(2, 3)}, r"labels: expected shape \(2,\), one for each query, got \(3,\)"),
        ({"labels": targets(2, 2).int()}, r"labels: expected torch.int64 on cpu, got torch.int32 on cpu"),
        ({"temperature": 0.0}, r"temperature: expected a positive number, got 0.0"),
        ({"temperature": -0.05}, r"temperature: expected a positive number, got -0.05"),
        ({"temperature": float("nan")}, r"temperature: expected a positive number, got nan"),
        ({"temperature": 1e-40}, r"temperature: expected a number between 1\.18e-38 and 3\.4e\+38, got 1e-40"),
        (
            {"temperature": torch.tensor(0.05, requires_grad=True)},
            r"temperature: expected a positive number, got a torch.float32 tensor of 0 dimensions that requires",
        ),
        ({"backend": "gpu"}, r"backend: expected one of cpu, triton, cuda, torch, reference, got 'gpu'"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        fastlm.contrastive_loss(**{"queries": floats(2, 5), "documents": floats(2, 5)} | changed)
