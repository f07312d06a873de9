"""fastlm.optim.AdamW gives the results, state and behaviour of torch.optim.AdamW; and its additions."""

import copy
import math
import subprocess
import sys

import pytest
import torch

import fastlm
from tests.optim.support import HYPER, SHAPES, close, gradients, moments, parameters, same_start, steps
from tests.support import DTYPES, FLOOR, assert_same_bits, error, floats, on_backends

LARGEST = torch.finfo(torch.float32).max  # clips nothing

# Results

OPTIONS = [
    HYPER,
    HYPER | {"maximize": True, "weight_decay": 0.0},
    HYPER | {"betas": (0.0, 0.5), "eps": 0.1},
    HYPER | {"betas": (0.3, 0.999), "lr": torch.tensor(0.05)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["usual", "maximize", "no mean", "tensor lr"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends("reference", "torch", "cpu")
def test_a_step_against_float64(backend, dtype, options):
    """Parameters and moments have at most twice the error of PyTorch's fused kernel, from a state after some steps."""
    own = parameters(dtype=dtype)
    truth, theirs = same_start(own, torch.float64), same_start(own, dtype)
    optimizers = {
        "ours": (fastlm.optim.AdamW(own, **options, backend=backend), own),
        "torch": (torch.optim.AdamW(theirs, **options, fused=True), theirs),
        "truth": (torch.optim.AdamW(truth, **options), truth),
    }
    for optimizer, tensors in optimizers.values():
        for i, p in enumerate(tensors):
            first, second = (
                g.to(dtype).to(p.dtype) for g in (gradients([p.shape], i)[0], gradients([p.shape], 50 + i)[0].square())
            )
            optimizer.state[p] = {"step": torch.tensor(6.0), "exp_avg": first, "exp_avg_sq": second}
            p.grad = gradients([p.shape], 100 + i)[0].to(dtype).to(p.dtype)
        optimizer.step()
    for i in range(len(own)):
        for ours, native, exact in zip(
            *([tensors[i].detach(), *moments(o, tensors[i : i + 1])] for o, tensors in optimizers.values()), strict=True
        ):
            assert ours.dtype == dtype
            assert error(ours, exact) <= 2 * error(native, exact) + FLOOR[dtype], f"parameter {i}"
    assert all(optimizers["ours"][0].state[p]["step"] == 7 for p in own)


@on_backends("reference", "torch", "cpu")
def test_many_steps_against_float64(backend):
    own = parameters()
    truth, theirs = same_start(own, torch.float64), same_start(own, torch.float32)
    optimizers = (
        fastlm.optim.AdamW(own, **HYPER, backend=backend),
        torch.optim.AdamW(theirs, **HYPER, fused=True),
        torch.optim.AdamW(truth, **HYPER),
    )
    for ours, native, exact in zip(*(steps(o, 20) for o in optimizers), strict=True):
        assert error(ours, exact) <= 2 * error(native, exact) + FLOOR[torch.float32]


@on_backends("reference", "torch", "cpu")
def test_groups_have_own_settings_and_parameters_own_step_counts(backend):
    def groups(own):
        return [
            {"params": own[:3], "lr": 0.1},
            {"params": own[3:5], "betas": (0.5, 0.6), "weight_decay": 0.0},
            {"params": own[5:], "eps": 1.0, "maximize": True},
        ]

    own, theirs = parameters(), parameters()
    optimizers = fastlm.optim.AdamW(groups(own), **HYPER, backend=backend), torch.optim.AdamW(groups(theirs), **HYPER)
    for i in range(6):
        for optimizer, tensors in zip(optimizers, (own, theirs), strict=True):
            for j, (p, gradient) in enumerate(zip(tensors, gradients(SHAPES, i), strict=True)):
                p.grad = gradient if j % 2 == 0 or i > 2 else None  # half of them have none at first
            optimizer.step()
    close([p.detach() for p in own], [p.detach() for p in theirs])
    assert [optimizers[0].state[p]["step"].item() for p in own] == [6, 3] * 4


def test_creating_state_early_changes_no_bit():
    results = []
    for early in (True, False):
        own = [*parameters(), torch.nn.Parameter(floats(3).bfloat16()), floats(5)]
        optimizer = fastlm.optim.AdamW(own, **HYPER, master_weights=True)
        for i in range(3):
            if early:
                optimizer.begin()  # the second and third call change nothing
                assert len(optimizer.state) == len(own) - 1 and all(
                    state["step"] == i for state in optimizer.state.values()
                )
            for p, gradient in zip(own, gradients(SHAPES, i), strict=False):
                p.grad = gradient
            own[-2].grad = torch.full((3,), 0.5, dtype=torch.bfloat16)
            optimizer.step()
        results.append([*own, *(state[key] for state in optimizer.state.values() for key in sorted(state))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_backends("reference", "torch", "cpu")
def test_parameters_without_a_gradient_are_not_updated(backend):
    own = [*parameters([(3,), (4,)]), floats(5)]
    before = [p.detach().clone() for p in own]
    optimizer = fastlm.optim.AdamW(own, **HYPER, backend=backend)
    optimizer.step()  # without any gradient
    own[0].grad = floats(3)
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(own, before, strict=True)] == [False, True, True] and list(
        optimizer.state
    ) == [own[0]]


# Clipping


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3], ids=["small", "usual", "large"])
@on_backends("reference", "torch", "cpu")
def test_clipping_matches_clip_grad_norm_and_does_not_write_gradients(backend, scale):
    own, theirs = parameters(), parameters()
    ours = fastlm.optim.AdamW(own, **HYPER, max_grad_norm=0.5, backend=backend)
    native = torch.optim.AdamW(theirs, **HYPER)
    for i in range(3):
        for p, q, gradient in zip(own, theirs, gradients(SHAPES, i, scale), strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        ours.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        native.step()
        assert ours.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        assert_same_bits([p.grad for p in own], gradients(SHAPES, i, scale))
    # Clipping rounds each gradient once and the norm a few times: a few units in the last place of every update.
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends("reference", "torch", "cpu")
def test_the_norm_against_float64(backend, dtype):
    """With a million elements: the error must not grow with their number."""
    shapes = [(1_000_000,), (7,), (300, 200)]
    own = parameters(shapes, dtype)
    optimizer = fastlm.optim.AdamW(own, max_grad_norm=1.0, backend=backend)
    for p, gradient in zip(own, gradients(shapes, 0), strict=True):
        p.grad = gradient.to(dtype)
    optimizer.step()
    truth, native = (torch.nn.utils.get_total_norm([p.grad.to(t) for p in own]).item() for t in (torch.float64, dtype))
    ours = optimizer.grad_norm.item()
    assert abs(ours - truth) <= 2 * abs(native - truth) + 2**-23 * truth
    assert backend == "torch" or abs(ours - truth) <= 2**-23 * truth  # PyTorch's own sum is less exact


@on_backends("reference", "torch", "cpu")
def test_non_finite_gradients_behave_as_with_clip_grad_norm_(backend):
    for value in (math.nan, math.inf):
        own, theirs = parameters([(40,), (3,)]), parameters([(40,), (3,)])
        for p in own + theirs:
            p.grad = torch.ones_like(p)
        own[0].grad[7] = theirs[0].grad[7] = value
        ours = fastlm.optim.AdamW(own, **HYPER, max_grad_norm=1.0, backend=backend)
        ours.step()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        torch.optim.AdamW(theirs, **HYPER).step()
        for a, b in zip(own, theirs, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-6, atol=1e-6)
        assert not ours.grad_norm.isfinite()


def test_the_norm_includes_every_group_dtype_and_backend():
    shapes = [(30,), (40,), (50,)]
    own = [
        same_start([p], dtype)[0]
        for p, dtype in zip(parameters(shapes), (torch.float32, torch.bfloat16, torch.float64), strict=True)
    ]
    optimizer = fastlm.optim.AdamW([{"params": own[:1]}, {"params": own[1:]}], max_grad_norm=1.0)
    steps(optimizer, 1)
    truth = torch.nn.utils.get_total_norm([p.grad.double() for p in own]).item()
    assert optimizer.grad_norm.item() == pytest.approx(truth, rel=2**-22)


# Master weights and zeroing of gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_backends("reference", "torch", "cpu")
def test_master_weights_match_float32_training(backend, dtype):
    own = parameters(dtype=dtype)
    wide = same_start(own, torch.float32)
    ours = fastlm.optim.AdamW(own, **HYPER | {"lr": 1e-4}, master_weights=True, max_grad_norm=3.0, backend=backend)
    same = fastlm.optim.AdamW(wide, **HYPER | {"lr": 1e-4}, max_grad_norm=3.0, backend=backend)
    for i in range(10):
        for p, q, gradient in zip(own, wide, gradients(SHAPES, i), strict=True):
            p.grad, q.grad = gradient.to(dtype), gradient.to(dtype).float()
        ours.step(), same.step()
    for p, q in zip(own, wide, strict=True):
        close([ours.state[p]["master_param"]], [q.detach()])
        assert torch.equal(p, ours.state[p]["master_param"].to(dtype))
        assert {key: value.dtype for key, value in ours.state[p].items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq", "master_param"), torch.float32
        )


@on_backends("reference", "torch", "cpu")
def test_a_parameter_that_was_changed_replaces_its_master(backend):
    own = parameters([(2000,)], torch.bfloat16)
    optimizer = fastlm.optim.AdamW(own, lr=1e-5, weight_decay=0.0, master_weights=True, backend=backend)
    steps(optimizer, 3)
    kept = optimizer.state[own[0]]["master_param"].clone()
    with torch.no_grad():
        own[0][:1000] = 3.0  # a checkpoint, a constraint, …
    steps(optimizer, 1, first=3)
    master = optimizer.state[own[0]]["master_param"]
    assert (master[:1000] - 3.0).abs().max() < 1e-4
    assert 0 < (master[1000:] - kept[1000:]).abs().max() < 1e-4 and (kept[1000:] != kept[1000:].bfloat16()).any()


@on_backends("reference", "torch", "cpu")
def test_gradients_are_zeroed_in_the_step(backend):
    own, theirs = parameters(), parameters()
    kept = [torch.zeros_like(p) for p in own]
    optimizer = fastlm.optim.AdamW(own, **HYPER, zero_gradients=True, backend=backend)
    for p, gradient in zip(own, kept, strict=True):
        p.grad = gradient
    for p, gradient in zip(own, gradients(SHAPES, 0), strict=True):
        p.grad.copy_(gradient)
    optimizer.step()
    assert all(p.grad is gradient and not gradient.any() for p, gradient in zip(own, kept, strict=True))
    close([p.detach() for p in own], steps(torch.optim.AdamW(theirs, **HYPER), 1))


# Behaviour as an optimiser


def test_autograd_detects_the_update():
    x, w = floats(4, 3), floats(3).requires_grad_()
    optimizer = fastlm.optim.AdamW([w])
    loss = (x * w).square().sum()  # saves x · w, but not w: x needs no gradient
    product = w * w  # saves w
    loss.backward()
    version = w._version
    optimizer.step()
    assert w._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@on_backends("reference", "torch", "cpu")
def test_every_tensor_that_is_written_has_a_new_version(backend):
    own = parameters([(5,)], torch.bfloat16)
    optimizer = fastlm.optim.AdamW(own, master_weights=True, zero_gradients=True, backend=backend)
    steps(optimizer, 1)
    written = [own[0], own[0].grad, *optimizer.state[own[0]].values()]
    before = [x._version for x in written]
    optimizer.step()
    assert all(x._version > version for x, version in zip(written, before, strict=True))


def test_closures_hooks_and_schedulers():
    own, theirs = parameters([(30,)]), parameters([(30,)])
    results, calls = [], []
    for optimizer, (p,) in ((fastlm.optim.AdamW(own, **HYPER), own), (torch.optim.AdamW(theirs, **HYPER), theirs)):
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)  # sets betas too
        optimizer.register_step_post_hook(lambda *_: calls.append(1))

        def closure(optimizer=optimizer, p=p):
            optimizer.zero_grad()
            loss = (p - 1).square().sum()
            loss.backward()
            return loss

        for _ in range(8):
            results.append(optimizer.step(closure).item())
            schedule.step()
    assert results[:8] == pytest.approx(results[8:], rel=1e-5) and results[7] < results[0] and len(calls) == 16


@pytest.mark.parametrize("overflow", [False, True])
@on_backends("reference", "torch", "cpu")
def test_grad_scaler(backend, overflow):
    own, theirs = parameters([(30,), (7, 5)]), parameters([(30,), (7, 5)])
    ours = fastlm.optim.AdamW(own, **HYPER, max_grad_norm=0.5, zero_gradients=True, backend=backend)
    native = torch.optim.AdamW(theirs, **HYPER, fused=True)
    for i in range(3):
        for optimizer, tensors in ((ours, own), (native, theirs)):
            scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
            scaler.scale(torch.ones(()))
            for p, gradient in zip(tensors, gradients([p.shape for p in own], i), strict=True):
                p.grad = gradient * scaler.get_scale()
            if overflow and i == 1:
                tensors[1].grad[2, 3] = math.inf
            if optimizer is native:
                scaler.unscale_(native)
                norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == (500.0 if overflow and i == 1 else 1000.0)
        assert not any(p.grad.any() for p in own)
        if not (overflow and i == 1):
            assert ours.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for p, q in zip(own, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
        assert ours.state[p]["step"] == (2 if overflow else 3)


def test_a_whole_step_under_torch_compile():
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    plain = copy.deepcopy(model)
    x = floats(5, 8)

    def step(model, optimizer):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    ours = fastlm.optim.AdamW(model.parameters(), **HYPER)
    native = torch.optim.AdamW(plain.parameters(), **HYPER)
    compiled = torch.compile(step, backend="aot_eager")
    for _ in range(4):
        torch.testing.assert_close(compiled(model, ours), step(plain, native), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_step_does_not_import_the_compiler():
    """It takes a second. PyTorch imports it for the first call of several methods of an optimizer."""
    code = """
import sys, torch, fastlm
p = torch.ones(3, requires_grad=True)
optimizer = fastlm.optim.AdamW([p])
p.sum().backward()
optimizer.step()
optimizer.zero_grad()
assert p.grad is None and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parameters_whose_memory_moves():
    """FSDP and others replace the memory of a parameter, so nothing may be cached by address."""
    own, theirs = parameters(), parameters()
    ours, native = fastlm.optim.AdamW(own, **HYPER), torch.optim.AdamW(theirs, **HYPER)
    for i in range(3):
        for p in own:
            p.data = p.data.clone()
            ours.state.get(p, {}).update({k: v.clone() for k, v in ours.state.get(p, {}).items()})
        steps(ours, 1, first=i), steps(native, 1, first=i)
    close([p.detach() for p in own], [p.detach() for p in theirs])


# Layouts


def layouts():
    base = floats(40, 60)
    return {
        "transposed": base.t(),
        "channels last": floats(2, 8, 5, 6).to(memory_format=torch.channels_last),
        "with gaps": base[:, ::2],
        "rows of a larger one": floats(50, 30)[5:9],
        "every other row": base[::2],
        "size 1": floats(1, 7)[:, :1],
    }


@pytest.mark.parametrize("gradient_too", [True, False])
@pytest.mark.parametrize("name", list(layouts()))
def test_any_layout(name, gradient_too):
    own, theirs = (
        layouts()[name].requires_grad_(),
        layouts()[name].clone(memory_format=torch.contiguous_format).requires_grad_(),
    )
    ours = fastlm.optim.AdamW([own], **HYPER, zero_gradients=True, max_grad_norm=1.0)
    native = torch.optim.AdamW([theirs], **HYPER)
    strides = own.stride()
    for i in range(3):
        gradient = gradients([own.shape], i)[0]
        own.grad = torch.empty_like(own).copy_(gradient) if gradient_too else gradient.clone()
        theirs.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        ours.step(), native.step()
        assert not own.grad.any()
    torch.testing.assert_close(own, theirs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.state[own]["exp_avg_sq"], native.state[theirs]["exp_avg_sq"], rtol=2e-6, atol=0)
    assert own.stride() == strides


def test_memory_around_a_parameter_is_not_written():
    whole = floats(100)
    before = whole.clone()
    part = whole[30:47].requires_grad_()
    steps(fastlm.optim.AdamW([part], **HYPER), 2)
    assert (
        torch.equal(whole[:30], before[:30])
        and torch.equal(whole[47:], before[47:])
        and not torch.equal(whole[30:47], before[30:47])
    )


def test_parameters_that_share_memory_are_updated_in_order():
    memory, other = floats(70_000), floats(70_000)
    own, theirs = (
        [memory.view(-1).requires_grad_(), memory.view(70, -1).requires_grad_()],
        [other.view(-1).requires_grad_(), other.view(70, -1).requires_grad_()],
    )
    close(steps(fastlm.optim.AdamW(own, **HYPER), 3), steps(torch.optim.AdamW(theirs, **HYPER), 3))


@on_backends("cpu")
def test_same_bits_on_every_thread_count(backend):
    def run(threads):
        torch.set_num_threads(threads)
        own = parameters([(5,), (200_000,), (3, 7), (16384,), (40_000,), (1,)])
        optimizer = fastlm.optim.AdamW(own, **HYPER, max_grad_norm=1.0, backend=backend)
        return [*steps(optimizer, 3), optimizer.grad_norm]

    before = torch.get_num_threads()
    try:
        once = run(1)
        for threads in (1, 2, 3, 4) * 3:
            assert_same_bits(run(threads), once)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [0.5, LARGEST])
@on_backends("reference", "torch", "cpu")
def test_skip_nonfinite(backend, max_grad_norm, value):
    """A step with a gradient that is not finite changes nothing; the others are those of an optimiser without it."""
    own, theirs = parameters(), parameters()
    options = {"max_grad_norm": max_grad_norm, "zero_gradients": True, "backend": backend}
    ours = fastlm.optim.AdamW(own, **HYPER, **options, skip_nonfinite=True)
    plain = fastlm.optim.AdamW(theirs, **HYPER, **options)
    for i in range(4):
        for p, q, gradient in zip(own, theirs, gradients(SHAPES, i), strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        if i == 2:
            own[0].grad.view(-1)[1] = value
        ours.step()
        assert ours.grad_norm.isfinite() == (i != 2) and not any(p.grad.any() for p in own)
        if i != 2:
            plain.step()
            assert ours.grad_norm == plain.grad_norm
    assert_same_bits(own, theirs)
    for p, q in zip(own, theirs, strict=True):
        assert_same_bits([ours.state[p][k] for k in ours.state[p]], [plain.state[q][k] for k in plain.state[q]])


@pytest.mark.parametrize("layout", ["dense", "transposed"])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_on_the_device(found, layout):
    """PyTorch's implementation takes the flag as a tensor, so that nothing waits for a GPU."""
    p, gradient = torch.nn.Parameter(floats(6, 5)), floats(6, 5)
    if layout == "transposed":
        p, gradient = torch.nn.Parameter(floats(5, 6).t()), floats(5, 6).t()
    optimizer = fastlm.optim.AdamW([p], **HYPER, backend="torch", zero_gradients=True)
    p.grad = gradient
    optimizer.begin()
    before = p.detach().clone()
    (batch,) = optimizer._batches()
    with torch.no_grad():
        batch.update(1.0, True, torch.tensor(found))
    assert torch.equal(p, before) == (found == 1.0) and not p.grad.any()
    assert optimizer.state[p]["step"] == 1.0 - found and optimizer.state[p]["exp_avg"].any() == (found == 0.0)


def test_the_largest_number_computes_the_norm_without_clipping():
    own, theirs = parameters(), parameters()
    ours, plain = fastlm.optim.AdamW(own, **HYPER, max_grad_norm=LARGEST), fastlm.optim.AdamW(theirs, **HYPER)
    steps(ours, 2)
    steps(plain, 2)
    assert_same_bits(own, theirs)
    assert ours.grad_norm.item() == pytest.approx(torch.nn.utils.get_total_norm([p.grad for p in own]).item())
    with pytest.raises(ValueError, match="skip_nonfinite: expected False without max_grad_norm"):
        fastlm.optim.AdamW(own, skip_nonfinite=True)


@on_backends("reference", "torch", "cpu")
def test_sum_squares(backend):
    """Two processes with a part of the parameters each clip by the norm of all gradients."""
    whole = parameters()
    parts = same_start(whole, torch.float32)
    for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
        p.grad = gradients([p.shape], i)[0]
        q.grad = p.grad.clone()
    squares = [sum(p.grad.double().square().sum().item() for p in some) for some in (parts[:2], parts[2:])]
    fastlm.optim.AdamW(whole, **HYPER, max_grad_norm=0.5, backend=backend).step()
    for some, others in ((parts[:2], squares[1]), (parts[2:], squares[0])):
        options = {"max_grad_norm": 0.5, "sum_squares": lambda x, others=others: x + others, "backend": backend}
        optimizer = fastlm.optim.AdamW(some, **HYPER, **options)
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)
    for p, q in zip(whole, parts, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_sum_squares_needs_a_norm():
    with pytest.raises(ValueError, match="sum_squares: expected None without max_grad_norm"):
        fastlm.optim.AdamW(parameters(), sum_squares=lambda x: x)
    with pytest.raises(ValueError, match="sum_squares: expected a function or None, got 3"):
        fastlm.optim.AdamW(parameters(), max_grad_norm=1.0, sum_squares=3)
