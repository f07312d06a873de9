"""The promises that all operators make: autograd, tracing, devices, threads, autocast."""

import concurrent.futures
import contextlib
import dataclasses
import mmap
import sys

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastlm
from fastlm.backends import cuda, registry, selection
from tests.ops.cases import CASES, case_named, float64_leaves, on_every_case
from tests.support import BACKENDS as ALL
from tests.support import (
    EMULATED,
    INTERPRETED,
    as_tuple,
    assert_same_bits,
    error,
    floats,
    implementation_module,
    on_backends,
    on_every_backend,
    targets,
)


def run(case, backend, leaves, **options):
    """(results, gradients), always with the same dropout mask."""
    torch.manual_seed(7)
    results = as_tuple(case.call(backend)(*leaves))
    upstreams = [floats(*y.shape).to(y.dtype) for y in results]
    return [y.detach() for y in results], list(torch.autograd.grad(results, leaves, upstreams, **options))


def assert_close(a, b):
    """Check that tensors differ at most by the order of some additions."""
    tolerances = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and error(x, y.double()) <= tolerances[x.dtype]


# Double backward


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_first_and_second_gradients_of_the_reference(case):
    def seeded(*leaves):
        torch.manual_seed(7)  # the same dropout mask every time
        return case.call("reference")(*leaves)

    leaves = float64_leaves(case)
    assert torch.autograd.gradcheck(seeded, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(seeded, leaves, fast_mode=True)


@on_every_case
def test_create_graph_gives_the_same_first_gradient(case, backend):
    leaves = case.leaves()
    assert_close(run(case, backend, leaves, create_graph=True)[1], run(case, backend, leaves)[1])


def test_one_input_computed_from_another():
    """The path between them belongs to the caller's graph, and its gradient counts once."""
    x = floats(3, 5, dtype=torch.float64).requires_grad_()
    for function in (
        lambda x: fastlm.linear(x, x * 2),
        lambda x: fastlm.layernorm_residual(x, x * 2, x[0])[0],
        lambda x: fastlm.rms_norm_residual(x, x * 2, x[0])[0],
        lambda x: fastlm.gelu_mlp(x, x * 2, x[0, :3], x.t() * 3, None),
        lambda x: fastlm.glu_mlp(x, x * 2, x, x.t() * 3, x[0, :3]),
        lambda x: fastlm.linear_cross_entropy(x, x * 2, torch.tensor([0, 2, 1])),
        lambda x: fastlm.linear_log_prob(x, x * 2, torch.tensor([0, 2, 1])),
        lambda x: fastlm.contrastive_loss(x, x.sin(), negatives=x[:2] * x[1:], temperature=0.5),
        lambda x: fastlm.attention(*(x[None, None] * i for i in (1, 2, 3))),
        lambda x: fastlm.attention_varlen(*(x[:, None] * i for i in (1, 2, 3)), *[torch.tensor([0, 2, 3])] * 2),
    ):
        assert torch.autograd.gradcheck(function, (x,)) and torch.autograd.gradgradcheck(function, (x,))


# Tracing


class Recorder(TorchDispatchMode):
    """Records the calls of fastlm's operators with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "fastlm":
            self.calls.append((function, [x.detach() if torch.is_tensor(x) else x for x in arguments], options or {}))
        return function(*arguments, **(options or {}))


def recorded(case, backend):
    leaves = case.leaves()
    with Recorder() as recorder:
        run(case, backend, leaves)
    return recorder.calls


@on_every_case(backends=ALL)
def test_traced_operators_pass_opcheck(case, backend):
    calls, operator = recorded(case, backend), registry.operators()[case.operator]
    names = [function.name().removeprefix("fastlm::") for function, _, _ in calls]
    # linear_cross_entropy computes its gradients in the forward pass, except with reduction="none".
    one_call = operator.Backward is None and not case.name.endswith("none")
    assert names[0].endswith("_forward") and len(names) == (1 if one_call else 2)
    # AOTAutograd depends only on the schema and the fake results, which all backends share.
    checks = ("test_schema", "test_faketensor", *(("test_aot_dispatch_dynamic",) if backend == "reference" else ()))
    for function, arguments, options in calls:
        torch.library.opcheck(function, arguments, options, test_utils=checks)


@on_every_case
def test_a_dispatch_mode_changes_no_result(case, backend):
    with Recorder():
        traced = run(case, backend, case.leaves())
    plain = run(case, backend, case.leaves())
    assert_same_bits([*traced[0], *traced[1]], [*plain[0], *plain[1]])


@on_every_case
def test_fake_tensors_touch_no_memory(case, backend):
    real = run(case, backend, case.leaves())[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = as_tuple(case.call(backend)(*(mode.from_tensor(x) for x in case.leaves())))
    assert [(y.shape, y.dtype, y.stride()) for y in fakes] == [(y.shape, y.dtype, y.stride()) for y in real]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_meta_tensors(backend):
    for case in CASES:
        if not case.fixed:
            results = as_tuple(case.call(backend)(*(x.to("meta") for x in case.inputs(torch.float32))))
            assert all(y.is_meta for y in results)


def counting_traces():
    traces = []

    def backend(graph, inputs):
        traces.append(graph)
        return graph.forward

    return traces, backend


@pytest.mark.parametrize("case", [case for case in CASES if not case.fixed], ids=lambda case: case.name)
def test_one_graph_for_all_sizes_under_compile(case):
    torch._dynamo.reset()
    traces, counter = counting_traces()
    compiled = torch.compile(case.call("reference"), fullgraph=True, dynamic=True, backend=counter)
    for length in (9, 7, 4):
        shorter = [
            x[tuple(slice(length) if size == 9 else slice(None) for size in x.shape)].clone()
            for x in case.inputs(torch.float32)
        ]
        compiled(*shorter)
    assert len(traces) == 1


@on_every_case(backends=("cpu", "cuda"))  # the graph is the same on every backend
def test_compiled_with_gradients(case, backend):
    torch._dynamo.reset()
    leaves = case.leaves()
    expected = run(case, backend, leaves)
    compiled = torch.compile(case.call(backend), fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    results = as_tuple(compiled(*leaves))
    gradients = torch.autograd.grad(results, leaves, [floats(*y.shape).to(y.dtype) for y in results])
    assert_close([*results, *gradients], [*expected[0], *expected[1]])


def block(x, norm, norm_bias, qkv, qkv_bias, up, up_bias, down, down_bias, vocabulary, target, dropout_p, backend):
    """A pre-norm layer and a loss."""
    options = {"backend": backend}
    y, _ = fastlm.layernorm_residual(x, None, norm, norm_bias, **options)
    query, key, value = fastlm.linear(y, qkv, qkv_bias, **options).view(2, 9, 3, 2, 12).permute(2, 0, 3, 1, 4)
    attended = (
        fastlm.attention(query, key, value, causal=True, dropout_p=dropout_p, **options).transpose(1, 2).flatten(2)
    )
    y, s = fastlm.layernorm_residual(attended, x, norm, norm_bias, dropout_p=dropout_p, **options)
    y, _ = fastlm.layernorm_residual(
        fastlm.gelu_mlp(y, up, up_bias, down, down_bias, recompute=1, **options), s, norm, norm_bias, **options
    )
    return fastlm.linear_cross_entropy(y, vocabulary, target, **options)


def block_leaves():
    shapes = ((2, 9, 24), (24,), (24,), (72, 24), (72,), (48, 24), (48,), (24, 48), (24,), (40, 24))
    return [(floats(*shape, i + 1)[..., 0] / 3).contiguous().requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.slow
@on_backends("reference", "torch", "cpu")
def test_a_whole_layer_compiled_by_inductor(backend):
    dropout_p = 0.0 if backend == "torch" else 0.2
    torch._dynamo.reset()
    leaves, target = block_leaves(), targets(40, 2, 9)
    results = []
    with torch._inductor.config.patch(fallback_random=True):  # else inductor draws other seeds than eager mode
        for function in (block, torch.compile(block, fullgraph=True)):
            torch.manual_seed(3)
            loss = function(*leaves, target, dropout_p, backend)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert_close(*results)


def test_one_tensor_for_several_inputs_under_compile():
    """torch.compile does not support it for an autograd.Function."""
    torch._dynamo.reset()
    starts = torch.tensor([0, 2, 5])
    for function, shape in (
        (fastlm.attention, (1, 2, 5, 8)),
        (lambda *t: fastlm.attention_varlen(*t, starts, starts), (5, 2, 8)),
    ):
        x = floats(*shape).requires_grad_()
        outcomes = []
        for each in (
            lambda x, f=function: f(x, x, x),
            torch.compile(lambda x, f=function: f(x, x, x), fullgraph=True, backend="aot_eager"),
        ):
            out = each(x)
            outcomes.append((out.detach(), *torch.autograd.grad(out, x, floats(*shape))))
        assert_close(*outcomes)


def test_export():
    target = targets(40, 2, 9)

    class Layer(torch.nn.Module):
        def forward(self, *leaves):
            return block(*leaves, target, 0.0, None)

    leaves = tuple(x.detach() for x in block_leaves())
    program = torch.export.export(Layer(), leaves)
    calls = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("fastlm.")]
    assert len(calls) == 7 and "fastlm.attention_forward.default" in calls
    torch.testing.assert_close(program.module()(*leaves), Layer()(*leaves))


def test_every_compiled_call_draws_a_new_dropout_mask():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w: fastlm.layernorm_residual(x, None, w, dropout_p=0.5, backend="reference")[1], fullgraph=True
    )
    x, w = torch.ones(8, 64), torch.ones(64)
    first, second = compiled(x, w), compiled(x, w)
    assert not torch.equal(first, second) and set(first.unique().tolist()) == {0.0, 2.0}


def test_flops_are_counted():
    """As for PyTorch's operators: two per multiply-add, and masked scores of attention count."""
    rows, leaves = 18, block_leaves()
    with FlopCounterMode(display=False) as counter:
        block(*leaves, targets(40, 2, 9), 0.0, None).backward()
    linear, mlp, vocabulary = 24 * 72, 2 * 24 * 48, 40 * 24
    attention = 2 * 2 * 9 * 9 * 12
    forward = 2 * rows * (linear + mlp) + 4 * attention
    # Attention's backward has five products, one more than twice the forward's.
    assert counter.get_total_flops() == 3 * forward + 2 * attention + 3 * 2 * rows * vocabulary
    with FlopCounterMode(display=False) as counter:
        fastlm.gelu_mlp(*case_named("gelu_mlp recompute 0").leaves(), recompute=2).sum().backward()
    assert counter.get_total_flops() == 2 * 18 * (24 * 48 + 48 * 20) * 3 + 2 * 18 * 24 * 48


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transforms_of_torch_func_are_refused(case):
    first, *others = case.inputs(torch.float32)
    message = r"under a torch.func transform \(vmap, grad, jvp, …\): not supported; use torch.autograd"
    with pytest.raises(fastlm.Unsupported, match=message):
        torch.func.grad(lambda x: sum(y.sum() for y in as_tuple(case.call(None)(x, *others))))(first)
    with pytest.raises(fastlm.Unsupported, match=message):
        torch.func.vmap(lambda x: case.call(None)(x, *others))(first[None])


class Annotated(torch.Tensor):
    """A tensor subclass that adds nothing."""


@on_every_case
def test_tensor_subclasses(case, backend):
    plain = run(case, backend, case.leaves())
    leaves = [x.detach().as_subclass(Annotated).requires_grad_() for x in case.leaves()]
    results, gradients = run(case, backend, leaves)
    assert_close([y.as_subclass(torch.Tensor) for y in (*results, *gradients)], [*plain[0], *plain[1]])


# Memory and devices


@on_every_case
def test_results_are_on_the_device_of_the_inputs(case, backend):
    leaves = case.leaves()
    expected = run(case, backend, leaves)
    with torch.device("meta"):  # the default device must not apply to results
        torch.manual_seed(7)
        results = as_tuple(case.call(backend)(*leaves))
        upstreams = [torch.ones_like(y) for y in results]
        gradients = torch.autograd.grad(results, leaves, upstreams)
    assert_close([y.detach() for y in results], expected[0])
    assert all(d.device == x.device for d, x in zip(gradients, leaves, strict=True))


@on_backends("triton", "cuda")
def test_every_launch_is_on_the_device_of_its_tensors(backend, monkeypatch):
    """With several GPUs: a kernel launches on the current device, and the caller's is current again afterwards."""
    current, launches = [], []

    @contextlib.contextmanager
    def on(x):
        current.append(x.device)
        yield
        current.pop()

    def launching(launch):
        def launched(*arguments, **options):
            launches.append(current[-1:] == [torch.get_default_device()] or arguments)
            return launch(*arguments, **options)

        return launched

    for name in sorted({case.operator for case in CASES if backend in case.backends and not case.vendor_gemm}):
        module = implementation_module(name, backend)
        monkeypatch.setattr(module, "on_device", on)
        for kernels in [k for k in vars(module).values() if getattr(k, "__name__", "").startswith("fastlm.kernels.")]:
            monkeypatch.setattr(kernels, "launch", launching(kernels.launch))
    if backend == "cuda":
        monkeypatch.setattr(cuda, "device_and_stream", launching(cuda.device_and_stream))
    for case in CASES:
        if backend in case.backends:
            launches.clear()
            run(case, backend, case.leaves())
            assert set(launches) <= {True} and not current, case.name
            assert launches or case.vendor_gemm, case.name


@on_every_case(backends=ALL)
def test_inputs_are_never_written_to(case, backend):
    leaves = case.leaves()
    before = [(x.detach().clone(), x._version) for x in leaves]
    run(case, backend, leaves)
    assert all(
        torch.equal(x, old) and x._version == version and x.grad is None
        for x, (old, version) in zip(leaves, before, strict=True)
    )


@on_every_case(backends=ALL)
def test_an_expanded_upstream_gradient(case, backend):
    leaves = case.leaves()
    torch.manual_seed(7)
    sum(y.sum() for y in as_tuple(case.call(backend)(*leaves))).backward()
    torch.manual_seed(7)
    results = as_tuple(case.call(backend)(*leaves))
    assert_close(
        [x.grad for x in leaves],
        torch.autograd.grad(results, leaves, [torch.ones_like(y).contiguous() for y in results]),
    )


@on_every_case(backends=("reference", "torch", "cpu", "cuda"))
def test_unaligned_inputs(case, backend):
    """Every input begins one element after an aligned address."""
    shifted = [
        torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape).requires_grad_() for x in case.inputs(torch.float32)
    ]
    expected, got = run(case, backend, case.leaves()), run(case, backend, shifted)
    assert_close([*got[0], *got[1]], [*expected[0], *expected[1]])


def reserved(size):
    """Address space that takes no memory until it is written."""
    # Python has Linux's MAP_NORESERVE from 3.13 on.
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)


@pytest.mark.parametrize("rows, apart", [(2, 2**31 + 64), (4, 2**30)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Memory of a GPU cannot be reserved like that.
@on_backends("torch", "cpu", *(["triton"] if INTERPRETED else []), *(["cuda"] if EMULATED else []))
def test_offsets_of_more_than_two_to_the_31(rows, apart, dtype, backend):
    """Strides of 64 bits, and of 32 whose multiples have 64, in memory that is reserved and used where the rows are."""
    width = 40
    memory = torch.frombuffer(reserved(((rows - 1) * apart + width) * dtype.itemsize), dtype=dtype)
    x = memory.as_strided((rows, width), (apart, 1))
    x.copy_(floats(rows, width))
    w, table = floats(width, width).to(dtype), [floats(1, rows, width)] * 2

    def results(x):
        x = x.requires_grad_()
        heads = x.view(rows, 1, 1, width)
        tokens = x.view(1, 1, rows, width)
        ys = (
            fastlm.linear(x, w, backend=backend),
            fastlm.linear(w, x, backend=backend),
            fastlm.layernorm_residual(x, x, w[0], backend=backend)[0],
            fastlm.rms_norm_residual(x, x, w[0], backend=backend)[0],
            fastlm.gelu_mlp(x, w, None, w, None, backend=backend),
            fastlm.linear_cross_entropy(x, w, torch.arange(rows) + 3, backend=backend),
            fastlm.linear_cross_entropy(w, x, torch.arange(width) % rows, backend=backend),
            fastlm.contrastive_loss(x, w[:rows], negatives=x, backend=backend),
            fastlm.attention(tokens, tokens, tokens, backend=backend),
            fastlm.attention(heads, heads, heads, backend=backend),
            fastlm.rotary(tokens, tokens, *table, backend=backend)[0],
            fastlm.rotary(heads, heads, *(t[:, :1] for t in table), backend=backend)[0],
        )
        return ys, torch.autograd.grad(sum(y.float().sum() for y in ys), x)

    (far, dfar), (near, dnear) = results(x.detach()), results(x.detach().contiguous())
    for a, b in zip((*far, *dfar), (*near, *dnear), strict=True):
        assert error(a.detach(), b.detach().double()) <= {torch.float32: 2**-20, torch.bfloat16: 2**-6}[dtype]


@on_backends("cpu")
def test_more_than_two_to_the_31_keys(backend):
    """Positions beyond 2³¹, of which the window leaves four. The other keys are not read."""
    key_len = 2**31 + 100
    key, value = (
        torch.frombuffer(reserved(key_len * 2), dtype=torch.bfloat16).view(1, 1, key_len, 1) for _ in range(2)
    )
    key[0, 0, -6:, 0], value[0, 0, -6:, 0] = floats(6).bfloat16(), floats(1, 6)[0].bfloat16()
    query = floats(1, 1, 2, 1).bfloat16()
    out, lse = fastlm.attention(query, key, value, causal=True, window=(3, None), return_lse=True, backend=backend)
    expected = fastlm.attention(
        query, key[:, :, -6:], value[:, :, -6:], causal=True, window=(3, None), return_lse=True, backend=backend
    )
    assert_close((out, lse), expected)


# Threads


@on_every_case(backends=("cpu",))  # for other backends PyTorch's own promise holds
def test_same_bits_on_every_run_and_thread_count(case, backend):
    leaves, threads = case.leaves(), torch.get_num_threads()
    try:
        outcomes = []
        for n in (1, 2, 3, 4, *[threads] * 26):
            torch.set_num_threads(n)
            results, gradients = run(case, backend, leaves)
            outcomes.append([*results, *gradients])
    finally:
        torch.set_num_threads(threads)
    for outcome in outcomes[1:]:
        assert_same_bits(outcome, outcomes[0])


@on_backends("cpu")
def test_same_bits_on_every_thread_count_where_work_is_split(backend):
    """Sizes at which every kernel splits its work; the cases above may be too small for that."""
    threads = torch.get_num_threads()
    x, w, wide = floats(700, 96).requires_grad_(), floats(300, 96).requires_grad_(), floats(96, 300).requires_grad_()
    norm, target = floats(96).requires_grad_(), targets(300, 700)
    heads = floats(1, 3, 400, 32).requires_grad_()

    def outcome():
        y, s = fastlm.layernorm_residual(x, x, norm, norm, backend=backend)
        y, s = fastlm.rms_norm_residual(y, s, norm, backend=backend)
        mlp = fastlm.gelu_mlp(y, w, None, wide, None, backend=backend)
        loss = fastlm.linear_cross_entropy(mlp, w, target, backend=backend)
        attended = fastlm.attention(heads, heads, heads, causal=True, backend=backend)
        return (
            loss.detach(),
            attended.detach(),
            *torch.autograd.grad([loss, attended, s], [x, w, wide, norm, heads], [None, attended, s]),
        )

    try:
        outcomes = []
        for n in (1, 2, 3, 4, 2):
            torch.set_num_threads(n)
            outcomes.append(outcome())
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert_same_bits(other, outcomes[0])


@on_every_case(dropout=False)  # threads share the generator of the seeds
def test_several_python_threads_at_once(case, backend):
    """Each sets its own number of kernel threads: torch.set_num_threads is per Python thread."""
    results, gradients = run(case, backend, case.leaves())

    def many(threads):
        torch.set_num_threads(threads)
        return [run(case, backend, case.leaves()) for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for outcomes in pool.map(many, (1, 2, 3, 4)):
            for outcome in outcomes:
                assert_close([*outcome[0], *outcome[1]], [*results, *gradients])


# Autocast and activation checkpointing


@on_every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_on_a_cpu(case, backend, dtype):
    """As PyTorch: products in the lower precision, layer norm unchanged, gradients in the parameters' dtype.

    The backward pass gives the same inside and outside the context.
    """
    leaves = case.leaves()
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype):
        results = as_tuple(case.call(backend)(*leaves))
    # The second result of attention is the log-sum-exp.
    expected_dtypes = [torch.float32 if case.wide_result or i == 1 else dtype for i, _ in enumerate(results)]
    assert [y.dtype for y in results] == expected_dtypes
    narrow = [x.detach() if i in case.not_cast else x.detach().to(dtype) for i, x in enumerate(leaves)]
    narrow = [x.requires_grad_() for x in narrow]
    expected, gradients = run(case, backend, narrow)
    assert_close([y.detach() for y in results], expected)
    upstreams = [floats(*y.shape).to(y.dtype) for y in results]
    with torch.autocast("cpu", dtype):  # the backward must not cast again
        got = torch.autograd.grad(results, leaves, upstreams)
    assert all(d.dtype == torch.float32 for d in got)
    if case.rounds_weights:
        # `gradients` were rounded to 16 bits, and again where a mean is scaled; `got` were not: see below.
        tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        assert all(error(d, narrow.double()) <= tolerance for d, narrow in zip(got, gradients, strict=True))
    else:
        assert_close(got, [d.float() for d in gradients])


# Operators whose weights autocast rounds.
WITH_WEIGHTS = ("linear", "gelu_mlp", "glu_mlp", "linear_cross_entropy", "linear_log_prob")

# On the backends that implement them.
on_backends_with_weights = pytest.mark.parametrize(
    "name, backend",
    [(name, backend) for name in WITH_WEIGHTS for backend in ALL if registry.operators()[name].implements(backend)],
)


def call_with_weights(name, x, *weights, backend):
    if name == "linear":
        return fastlm.linear(x, *weights, layout="conv1d", backend=backend)
    if name == "gelu_mlp":
        return fastlm.gelu_mlp(x, *weights, recompute=1, backend=backend)
    if name == "glu_mlp":
        w_gate, b_gate, w_up, b_up, w_down, b_down = weights
        return fastlm.glu_mlp(x, w_gate, w_up, w_down, b_gate, b_up, b_down, backend=backend)
    target = targets(x.shape[1], x.shape[0])
    if name == "linear_log_prob":
        return torch.cat(fastlm.linear_log_prob(x, weights[0], target, weights[1], backend=backend))
    return fastlm.linear_cross_entropy(x, weights[0], target, weights[1], backend=backend)


def inputs_with_weights(name, rows=70):
    shapes = {
        "linear": [(24, 40), (40,)],
        "gelu_mlp": [(40, 24), (40,), (24, 40), (24,)],
        "glu_mlp": [(40, 24), (40,)] * 2 + [(24, 40), (24,)],
        "linear_cross_entropy": [(24, 24), (24,)],
        "linear_log_prob": [(24, 24), (24,)],
    }[name]
    return [x.requires_grad_() for x in (floats(rows, 24), *(floats(*shape) for shape in shapes))]


@on_backends("cpu")
@pytest.mark.parametrize("name", WITH_WEIGHTS)
@pytest.mark.parametrize("rows", [70, 7, 0])
@pytest.mark.parametrize("needs", ["all", "weights", "x", "biases"])
def test_under_autocast_gradients_of_float32_weights_are_not_rounded(name, rows, needs, backend):
    """They are gradients of the rounded weights in float32, exact where no intermediate is rounded to 16 bits."""
    inputs = inputs_with_weights(name, rows)
    for i, x in enumerate(inputs):
        x.requires_grad_({"all": True, "weights": i > 0, "x": i == 0, "biases": i > 0 and i % 2 == 0}[needs])
    wanted = [x for x in inputs if x.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        result = call_with_weights(name, *inputs, backend=backend)
    upstream = floats(*result.shape).to(result.dtype)
    got = torch.autograd.grad(result, wanted, upstream)
    exact = [x.detach().bfloat16().double().requires_grad_(x.requires_grad) for x in inputs]
    expected = torch.autograd.grad(
        call_with_weights(name, *exact, backend="reference"), [x for x in exact if x.requires_grad], upstream.double()
    )
    indices = [i for i, x in enumerate(inputs) if x.requires_grad]
    for i, gradient, true in zip(indices, got, expected, strict=True):
        assert gradient.dtype == torch.float32
        is_exact = (name == "linear" and i > 0) or (name == "gelu_mlp" and i == 4) or (name == "glu_mlp" and i == 6)
        assert error(gradient, true) <= (2**-18 if is_exact else 2**-7)
        if i > 0 and rows > 0:
            assert not torch.equal(gradient, gradient.bfloat16().float())


@on_backends_with_weights
def test_under_autocast_gradients_can_be_differentiated_down_to_float32_weights(name, backend):
    inputs = inputs_with_weights(name)
    with torch.autocast("cpu", torch.bfloat16):
        result = call_with_weights(name, *inputs, backend=backend)
    gradients = torch.autograd.grad(result.float().square().sum(), inputs, create_graph=True)
    assert [d.dtype for d in gradients] == [torch.float32] * len(inputs)
    twice = torch.autograd.grad(sum(d.square().sum() for d in gradients), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(
        call_with_weights(name, *exact, backend="reference").square().sum(), exact, create_graph=True
    )
    expected = torch.autograd.grad(sum(d.square().sum() for d in gradients), exact)
    for gradient, true in zip(twice, expected, strict=True):
        # Several intermediates are rounded to bfloat16.
        assert gradient.dtype == torch.float32 and error(gradient, true) <= 2**-4


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_under_autocast_differentiable_gradients_are_those_of_rounded_weights(name):
    inputs = inputs_with_weights(name)
    with torch.autocast("cpu", torch.bfloat16):
        result = call_with_weights(name, *inputs, backend="reference")
    upstream = floats(*result.shape).to(result.dtype)
    got = torch.autograd.grad(result, inputs, upstream, create_graph=True)
    exact = [x.detach().bfloat16().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(call_with_weights(name, *exact, backend="reference"), exact, upstream.double())
    # The casts of the formula are differentiated too, which rounds each gradient once.
    assert all(error(gradient, true) <= 2**-8 for gradient, true in zip(got, expected, strict=True))


@on_backends_with_weights
def test_under_autocast_weights_may_change_before_the_backward(name, backend):
    """As with PyTorch's operators, the backward reads the rounded copies."""
    inputs = inputs_with_weights(name)
    with torch.autocast("cpu", torch.bfloat16):
        result, same = (call_with_weights(name, *inputs, backend=backend) for _ in range(2))
    expected = torch.autograd.grad(result.sum(), inputs)
    with torch.no_grad():
        for x in inputs[1:]:
            x.zero_()
    assert_same_bits(torch.autograd.grad(same.sum(), inputs), expected)


@on_every_backend
def test_autocast_takes_a_16_bit_x_and_a_float32_residual(backend):
    x, stream, w = floats(4, 8), floats(8, 4).t().contiguous(), floats(8)
    with torch.autocast("cpu", torch.bfloat16):
        y, s = fastlm.layernorm_residual(fastlm.linear(x, torch.eye(8), backend=backend), stream, w, backend=backend)
        assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)
        y, s = fastlm.layernorm_residual(x, stream.bfloat16(), w, backend=backend)
        assert (y.dtype, s.dtype) == (torch.float32, torch.float32)  # as for x + residual


@on_every_case
def test_activation_checkpointing_gives_the_same_results(case, backend):
    leaves = case.leaves()
    results, gradients = run(case, backend, leaves)
    torch.manual_seed(7)
    again = as_tuple(torch.utils.checkpoint.checkpoint(case.call(backend), *leaves, use_reentrant=False))
    replayed = torch.autograd.grad(again, leaves, [floats(*y.shape).to(y.dtype) for y in again])
    assert_close([y.detach() for y in again], results)
    assert_close(replayed, gradients)


@pytest.mark.parametrize("number", [1, np.float32(1)], ids=["int", "NumPy"])
def test_backends_get_floats_for_any_kind_of_number(number, monkeypatch):
    """Triton would compile another kernel for an integer."""
    x, target, seen = floats(1, 1, 4, 8), targets(8, 4), []
    monkeypatch.setattr(selection, "_selected", {})
    for name in ("attention", "layernorm_residual", "linear_cross_entropy"):
        operator = registry.operators()[name]
        own = operator.implementation("torch")

        def spy(call, own=own):
            numbers = [a for a in call if isinstance(a, (int, float, np.floating)) and not isinstance(a, bool)]
            seen.append([type(a) for a in numbers])
            return own.forward(call)

        spied = dataclasses.replace(own, forward=spy, composite=None)
        monkeypatch.setattr(operator, "implementation", lambda backend, spied=spied: spied)
    fastlm.attention(x, x, x, scale=number, backend="torch")
    fastlm.layernorm_residual(x, None, x[0, 0, 0], eps=number, backend="torch")
    numbers = {"label_smoothing": number, "logit_scale": number, "softcap": number}
    fastlm.linear_cross_entropy(x[0, 0], floats(8, 8), target, **numbers, backend="torch")
    assert seen == [[float, float, int, int, float], [float, float], [int, float, float, float]]
