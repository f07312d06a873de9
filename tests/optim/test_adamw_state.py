"""The state of fastlm.optim.AdamW, what selects its implementation, and what it refuses."""

import copy
import math
import pickle
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from tests.optim.support import HYPER, close, parameters, steps
from tests.support import (
    BACKENDS,
    assert_same_bits,
    count_forwards,
    error,
    floats,
    on_backends,
    run_in_new_process,
)

# State


@on_backends("reference", "torch", "cpu")
def test_state_dicts_are_interchangeable(backend):
    """Steps of ours, PyTorch's and ours again give what PyTorch's alone gives."""
    own, theirs, alone = parameters(), parameters(), parameters()
    ours, native = fastlm.optim.AdamW(own, **HYPER, backend=backend), torch.optim.AdamW(theirs, lr=1.0)
    only = torch.optim.AdamW(alone, **HYPER)
    assert set(ours.param_groups[0]) == set(only.param_groups[0])
    steps(ours, 3)
    for p, q in zip(theirs, own, strict=True):
        p.data.copy_(q)
    native.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert_same_bits([p.detach() for p in own], [p.detach() for p in theirs])
    steps(native, 3, first=3)
    for p, q in zip(theirs, own, strict=True):
        q.data.copy_(p)
    ours.load_state_dict(copy.deepcopy(native.state_dict()))
    close(steps(ours, 3, first=6), steps(only, 9))
    assert_same_bits([s["step"] for s in ours.state.values()], [s["step"] for s in only.state.values()])
    assert [set(s) for s in ours.state.values()] == [set(s) for s in only.state.values()]


@pytest.mark.parametrize("fused", [True, False])
def test_a_state_dict_of_either_implementation_of_pytorch(fused):
    theirs, own = parameters(), parameters()
    native = torch.optim.AdamW(theirs, **HYPER, fused=fused)
    steps(native, 2)
    for p, q in zip(own, theirs, strict=True):
        p.data.copy_(q)
    ours = fastlm.optim.AdamW(own)
    ours.load_state_dict(copy.deepcopy(native.state_dict()))
    close(steps(ours, 2, first=2), steps(native, 2, first=2))


def test_state_with_an_integer_step_and_another_layout():
    own, theirs = parameters([(30, 20)]), parameters([(30, 20)])
    ours, native = fastlm.optim.AdamW(own, **HYPER), torch.optim.AdamW(theirs, **HYPER)
    steps(ours, 1), steps(native, 1)
    saved = copy.deepcopy(ours.state_dict())
    saved["state"][0] |= {"step": 1, "exp_avg": saved["state"][0]["exp_avg"].t().contiguous().t()}
    ours.load_state_dict(saved)
    close(steps(ours, 1, first=1), steps(native, 1, first=1))


@on_backends("reference", "torch", "cpu")
def test_master_weights_survive_a_state_dict(backend):
    def start():
        own = parameters(dtype=torch.bfloat16)
        return own, fastlm.optim.AdamW(own, lr=1e-4, master_weights=True, backend=backend)

    own, ours = start()
    steps(ours, 3)
    again, loaded = start()
    seen = []
    loaded.register_load_state_dict_pre_hook(lambda _, state: seen.append(state))
    for p, q in zip(again, own, strict=True):
        p.data.copy_(q)
    loaded.load_state_dict(pickle.loads(pickle.dumps(ours.state_dict())))
    assert_same_bits(steps(loaded, 3, first=3), steps(ours, 3, first=3))
    assert_same_bits(
        [s["master_param"] for s in loaded.state.values()], [s["master_param"] for s in ours.state.values()]
    )
    assert len(seen) == 1


def test_master_weights_start_from_a_state_dict_without_them():
    own = parameters(dtype=torch.bfloat16)
    native = torch.optim.AdamW(own, lr=1e-4)
    steps(native, 3)
    ours = fastlm.optim.AdamW(own, lr=1e-4, master_weights=True)
    ours.load_state_dict(native.state_dict())
    steps(ours, 1, first=3)
    assert all(value.dtype == torch.float32 for s in ours.state.values() for value in s.values())
    without = fastlm.optim.AdamW(own, lr=1e-4)
    without.load_state_dict(ours.state_dict())
    steps(without, 1, first=4)
    assert all(
        {key: value.dtype for key, value in s.items()}
        == {"step": torch.float32, "exp_avg": p.dtype, "exp_avg_sq": p.dtype}
        for p, s in without.state.items()
    )


def test_copies_and_pickles_keep_all_settings():
    model = torch.nn.Linear(5, 4)
    optimizer = fastlm.optim.AdamW(model.parameters(), **HYPER, max_grad_norm=0.1, zero_gradients=True)
    steps(optimizer, 2)
    for other_model, other in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        assert (other.max_grad_norm, other.zero_gradients, other.master_weights) == (0.1, True, False)
        reference = copy.deepcopy((model, optimizer))[1]
        assert_same_bits(steps(other, 1, first=2), steps(reference, 1, first=2))
        assert all(p is q for p, q in zip(other_model.parameters(), other.param_groups[0]["params"], strict=True))


# Backend selection


@pytest.mark.skipif("cpu" not in BACKENDS, reason="backend cpu is not under test")
@pytest.mark.parametrize(
    "dtype, options, selected, reason",
    [
        (torch.float32, {}, "cpu", ""),
        (torch.bfloat16, {}, "cpu", ""),
        (torch.float64, {}, "torch", "computes in torch.float32, torch.bfloat16, torch.float16, not torch.float64"),
        (torch.complex64, {}, "torch", "computes in torch.float32, torch.bfloat16, torch.float16, not torch.complex64"),
        (torch.float32, {"amsgrad": True}, "torch", "has no amsgrad"),
    ],
)
def test_pytorch_updates_what_the_kernel_does_not_support(dtype, options, selected, reason, monkeypatch):
    own, theirs = parameters([(30,), (20, 10)], dtype), parameters([(30,), (20, 10)], dtype)
    calls = count_forwards(monkeypatch, "adamw")
    optimizer = fastlm.optim.AdamW(own, **HYPER, **options)
    # Unfused, PyTorch rounds to bfloat16 after every operation.
    native = torch.optim.AdamW(theirs, **HYPER, **options, fused=dtype == torch.bfloat16)
    for a, b in zip(steps(optimizer, 3), steps(native, 3), strict=True):
        if dtype == torch.bfloat16:
            assert error(a, b.double()) <= 2**-8  # one rounding in the other direction
        else:
            torch.testing.assert_close(a, b)
    assert calls == [selected] * 3
    if reason:
        with pytest.raises(fastlm.Unsupported, match=f"adamw on cpu in {dtype} with backend='cpu': cpu {reason}"):
            steps(fastlm.optim.AdamW(own, **options, backend="cpu"), 1)


def test_amsgrad_can_be_enabled_later():
    own, theirs = parameters([(30,)]), parameters([(30,)])
    optimizer = fastlm.optim.AdamW(own, **HYPER)
    steps(optimizer, 1)
    optimizer.param_groups[0]["amsgrad"] = True
    steps(optimizer, 1, first=1)
    assert "max_exp_avg_sq" in optimizer.state[own[0]]
    close([p.detach() for p in own], steps(torch.optim.AdamW(theirs, **HYPER, amsgrad=True), 2))


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="gradients always have their parameter's dtype in this PyTorch"
)
@pytest.mark.parametrize("master", [True, False])
def test_gradients_of_another_dtype(master):
    p = floats(50).bfloat16().requires_grad_()
    p.grad_dtype = torch.float32
    p.grad = floats(50)
    wide = p.detach().float().requires_grad_()
    wide.grad = p.grad.clone()
    ours = fastlm.optim.AdamW([p], **HYPER, master_weights=master, zero_gradients=True)
    ours.step()
    torch.optim.AdamW([wide], **HYPER).step()
    torch.testing.assert_close(
        ours.state[p].get("master_param", p.detach()).float(), wide.detach(), rtol=1e-6 if master else 2**-7, atol=1e-6
    )
    assert not p.grad.any()


def test_dispatch_modes_and_fake_tensors():
    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = set()

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            self.names.add(function.name())
            return function(*arguments, **(options or {}))

    own = parameters([(3,)])
    own[0].grad = floats(3)
    with Recorder() as recorder:
        fastlm.optim.AdamW(own).step()
    assert any("adamw" in name or "addcdiv" in name for name in recorder.names)
    with FakeTensorMode():
        model = torch.nn.Linear(4, 4)
        optimizer = fastlm.optim.AdamW(model.parameters())
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        assert optimizer.state[model.weight]["exp_avg"].shape == (4, 4)


def test_parameters_on_the_meta_device():
    model = torch.nn.Linear(4, 4, device="meta")
    optimizer = fastlm.optim.AdamW(model.parameters(), backend="torch")
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    assert optimizer.state[model.weight]["exp_avg"].is_meta


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo is tested on Linux")
def test_sharded_parameters(tmp_path):
    """PyTorch's implementation updates FSDP's DTensors, and the norm is that of the whole gradients."""
    run_in_new_process(update_sharded, tmp_path / "store")


def update_sharded(store):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    model, plain = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)
    plain.load_state_dict(model.state_dict())
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    ours, native = (
        fastlm.optim.AdamW(model.parameters(), **HYPER, max_grad_norm=0.1),
        torch.optim.AdamW(plain.parameters(), **HYPER),
    )
    x = floats(3, 6)
    for _ in range(3):
        for network, optimizer in ((model, ours), (plain, native)):
            network(x).square().sum().backward()
            if optimizer is native:
                norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        assert ours.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    torch.testing.assert_close(model.weight.full_tensor(), plain.weight, rtol=1e-5, atol=1e-6)


# Errors


def test_sparse_gradients_are_refused_before_any_change():
    first, embedding = floats(3).requires_grad_(), torch.nn.Embedding(10, 4, sparse=True)
    before = first.detach().clone()
    optimizer = fastlm.optim.AdamW([{"params": [first]}, {"params": embedding.parameters()}])
    first.grad = floats(3)
    embedding(torch.tensor([1, 2])).sum().backward()
    message = (
        "gradient of parameter 0 in group 1: expected a dense one, got layout torch.sparse_coo; "
        "torch.optim.SparseAdam takes sparse gradients"
    )
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(first, before)


@on_backends("cpu")
@pytest.mark.parametrize(
    "key, value, got",
    [
        ("exp_avg_sq", torch.zeros(4, 5).t(), r"torch.float32 on cpu, shape \(5, 4\) and strides \(1, 5\)"),
        ("exp_avg_sq", torch.zeros(5, 4).double(), r"torch.float64 on cpu, .*"),
        ("step", torch.zeros(()).double(), r"torch.float64 on cpu, .*"),
    ],
)
def test_state_that_does_not_match_its_parameter_is_refused(backend, key, value, got):
    own = parameters([(5, 4)])
    optimizer = fastlm.optim.AdamW(own, backend=backend)
    steps(optimizer, 1)
    optimizer.state[own[0]][key] = value
    with pytest.raises(
        ValueError,
        match=rf"{key}: expected torch.float32 on cpu, shape \(.*\) and strides \(.*\) as its parameter's, got {got}",
    ):
        steps(optimizer, 1)


@on_backends("reference", "torch", "cpu")
@pytest.mark.parametrize(
    "key, value, message",
    [
        ("exp_avg", torch.zeros(3, 4), r"exp_avg: expected shape \(5, 4\), as its parameter, got \(3, 4\)"),
        ("exp_avg_sq", torch.zeros(4), r"exp_avg_sq: expected shape \(5, 4\), as its parameter, got \(4,\)"),
        ("step", torch.zeros(0), r"step: expected shape \(\), got \(0,\)"),
    ],
)
def test_state_of_another_size_is_refused(backend, key, value, message):
    own = parameters([(5, 4)])
    optimizer = fastlm.optim.AdamW(own, backend=backend)
    steps(optimizer, 1)
    optimizer.state[own[0]][key] = value
    with pytest.raises(ValueError, match=message):
        steps(optimizer, 1)


BETAS = r"betas: expected two numbers in \[0, 1\), got \(0.9,\)"
STATE_DICT = 'a dict with the keys "state" and "param_groups"'


@pytest.mark.parametrize(
    "change, message",
    [
        ({"exp_avg_sq": "x"}, "exp_avg_sq: expected a tensor, got 'x'"),
        ({"exp_avg": None}, "exp_avg: expected a tensor, got None"),
        (
            {"exp_avg": torch.zeros(5, 4, dtype=torch.int64)},
            "exp_avg: expected a floating-point tensor, got torch.int64",
        ),
        ({"exp_avg": torch.zeros(4)}, r"exp_avg: expected shape \(5, 4\), as its parameter, got \(4,\)"),
        (
            {"exp_avg": torch.zeros(5, 4, device="meta")},
            "exp_avg: expected a tensor with storage, got one on the meta .*",
        ),
        ({"step": "x"}, "step: expected a finite number of 0 or more, got 'x'"),
        ({"step": -1}, "step: expected a finite number of 0 or more, got -1"),
        ({"step": torch.ones(1)}, r"step: expected shape \(\), got \(1,\)"),
        ({"step": torch.tensor(True)}, "step: expected a number, got a torch.bool tensor of 0 dimensions"),
        ("step", "step: expected a tensor in the state of every parameter, or no state at all, got none"),
        ("exp_avg", "exp_avg: expected a tensor in the state of every parameter, or no state at all, got none"),
        (lambda saved: saved["state"].update({0: 3}), "state: expected a dict for every parameter, got 3"),
        (lambda saved: saved["param_groups"].clear(), "param_groups: expected 1, as the optimiser has, got 0"),
        (
            lambda saved: saved["param_groups"][0].pop("lr") and None,
            r"param_groups\[0\]\['lr'\]: expected a value, got none",
        ),
        (lambda saved: saved["param_groups"][0].update(betas=(0.9,)), BETAS),
        (
            lambda saved: saved["param_groups"][0]["params"].append(1),
            r"param_groups\[0\]\['params'\]: expected 1 parameters, got 2",
        ),
        (lambda saved: {}, f"state_dict: expected {STATE_DICT}, got one without 'state'"),
        (lambda saved: 3, f"state_dict: expected {STATE_DICT}, got 3"),
        (lambda saved: {"state": [], "param_groups": []}, r"state_dict\['state'\]: expected a dict, got list"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_before_any_change(change, message):
    own = parameters([(5, 4)])
    optimizer = fastlm.optim.AdamW(own)
    steps(optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    saved: Any = copy.deepcopy(before)
    if isinstance(change, dict):
        saved["state"][0] |= change
    elif isinstance(change, str):
        del saved["state"][0][change]
    else:
        replaced = change(saved)
        saved = saved if replaced is None else replaced
    with pytest.raises(ValueError, match=f"^{message}$"):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == str(before)


@on_backends("reference", "torch", "cpu")
def test_a_gradient_of_another_size_is_refused(backend):
    p = floats(50).requires_grad_()
    optimizer = fastlm.optim.AdamW([p], backend=backend)
    steps(optimizer, 1)
    p.data = floats(5000)  # its state and gradient have the old size
    with pytest.raises(ValueError, match=r"gradient: expected shape \(5000,\), as its parameter, got \(50,\)"):
        optimizer.step()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_grad_norm": 0}, "max_grad_norm: expected a finite number above 0, or None, got 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm: expected a finite number above 0, or None, got nan"),
        ({"lr": -1.0}, "lr: expected a finite number of 0 or more, got -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas: expected two numbers in \[0, 1\), got 1.0"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        fastlm.optim.AdamW(parameters([(3,)]), **options)
