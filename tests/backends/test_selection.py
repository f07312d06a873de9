"""Backend selection and its table."""

import concurrent.futures
import dataclasses
import itertools
import json
import subprocess
import sys
import types

import pytest
import torch

import fastlm
from fastlm.backends import cpu, measured, registry, selection, table
from fastlm.backends.rule import Rule
from fastlm.ops.linear.spec import Sizes
from tests.support import count_forwards, floats

X, W = floats(40, 8), floats(6, 8)
LINEAR, ATTENTION = registry.operators()["linear"], registry.operators()["attention"]
read_cpu_rules = table.cpu_rules.__wrapped__  # without its cache


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch):
    """Selection by the backend order alone, on every CPU; the table has its own tests."""
    monkeypatch.setattr(table, "cpu_rules", lambda: ())
    monkeypatch.setattr(measured, "SMALL_CALLS", ())
    monkeypatch.setattr(selection, "_selected", {})


@pytest.fixture
def selected(monkeypatch):
    """A function that makes a call of linear and returns the name of the backend that ran it."""
    calls = count_forwards(monkeypatch, "linear")

    def run(**options):
        fastlm.linear(X, W, **options)
        return calls[-1]

    return run


def test_precedence_argument_then_context_then_environment_then_auto(selected, monkeypatch):
    automatic = selected()
    assert automatic == ("cpu" if cpu.kernels else "torch")
    monkeypatch.setattr(selection, "from_environment", "reference")
    assert selected() == "reference"
    with fastlm.use_backend("torch"):
        assert selected() == "torch"
        assert selected(backend="reference") == "reference"
        with fastlm.use_backend("reference"):
            assert selected() == "reference"
        assert selected() == "torch"
    assert selected() == "reference"


def test_none_returns_to_automatic_selection(selected):
    automatic = selected()
    with fastlm.use_backend("reference"), fastlm.use_backend(None):
        assert selected() == automatic


def test_the_environment_variable_forces_a_backend():
    code = "import fastlm, torch; x = torch.ones(2, 2); {}"
    run = lambda name, code: subprocess.run(  # noqa: E731
        [sys.executable, "-W", "ignore", "-c", code],
        env={"FASTLM_BACKEND": name, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    done = run("cuda", code.format("fastlm.linear(x, x)"))
    assert "Unsupported: linear on cpu in torch.float32 with FASTLM_BACKEND=cuda: " in done.stderr
    done = run("gpu", code.format("fastlm.linear(x, x)"))
    assert "ValueError: FASTLM_BACKEND: expected one of cpu, triton, cuda, torch, reference, got 'gpu'" in done.stderr


def test_a_context_ends_on_an_error_and_belongs_to_its_thread():
    with pytest.raises(KeyError), fastlm.use_backend("torch"):
        raise KeyError
    assert selection.requested(None) is None
    with fastlm.use_backend("reference"), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(selection.requested, None).result() is None
        assert selection.requested(None) == "reference"


def test_a_compiled_function_follows_the_context():
    torch._dynamo.reset()
    seen = []
    compiled = torch.compile(
        fastlm.linear, fullgraph=True, backend=lambda graph, inputs: seen.append(str(graph.graph)) or graph.forward
    )
    compiled(X, W)
    with fastlm.use_backend("reference"):
        compiled(X, W)
    compiled(X, W)
    assert len(seen) == 2 and "reference" not in seen[0] and "reference" in seen[1]


def test_backward_uses_the_backend_of_the_forward():
    x = X.clone().requires_grad_()
    with fastlm.use_backend("reference"):
        y = fastlm.linear(x, W)
    assert y.grad_fn.backend.backend.name == "reference"


def test_backend_names_are_checked():
    for name in ("gpu", "CPU", ""):
        with (
            pytest.raises(
                ValueError, match=f"backend: expected one of cpu, triton, cuda, torch, reference, got '{name}'"
            ),
            fastlm.use_backend(name),
        ):
            pass


def test_the_closest_name_is_suggested():
    for name, closest in (("cdua", "cuda"), ("CPU", "cpu"), ("tritn", "triton")):
        with pytest.raises(ValueError, match=f"got '{name}'; did you mean '{closest}'\\?$"):
            fastlm.linear(X, W, backend=name)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_error_names_what_forced_the_backend(monkeypatch, compiled):
    def message(**options):
        call = lambda: fastlm.linear(X.double(), W.double(), **options)  # noqa: E731
        with pytest.raises(fastlm.Unsupported) as raised:
            torch.compile(call, backend="eager")() if compiled else call()
        return str(raised.value)

    monkeypatch.setattr(selection, "from_environment", "cuda")
    assert message().startswith("linear on cpu in torch.float64 with FASTLM_BACKEND=cuda: ")
    with fastlm.use_backend("triton"):
        assert message().startswith("linear on cpu in torch.float64 with use_backend('triton'): ")
        assert message(backend="cuda").startswith("linear on cpu in torch.float64 with backend='cuda': ")


def test_an_error_lists_every_backend_with_its_reasons():
    message = (
        r"linear on cpu in torch.float64 with backend='cpu': "
        r"cpu (computes in torch.float32, torch.bfloat16, torch.float16, not torch.float64|is not compiled.*); "
        r"triton .*; cuda .*; torch is available, but not selected; reference is available, but not selected"
    )
    with pytest.raises(fastlm.Unsupported, match=message):
        fastlm.linear(X.double(), W.double(), backend="cpu")


def test_a_forced_backend_never_falls_back():
    with (
        fastlm.use_backend("torch"),
        pytest.raises(fastlm.Unsupported, match="torch draws other dropout masks than fastlm"),
    ):
        fastlm.layernorm_residual(X, None, W[0], dropout_p=0.5)


def test_fallbacks_of_auto_are_counted_on_every_call():
    what = "linear: torch instead of cpu"
    before = fastlm.info().fallbacks.get(what, 0)
    for _ in range(3):
        fastlm.linear(X.double(), W.double())
    assert fastlm.info().fallbacks[what] == before + 3
    fastlm.linear(X.double(), W.double(), backend="torch")  # asked for, so no fallback
    assert fastlm.info().fallbacks[what] == before + 3


def test_decisions_are_cached_and_bounded(monkeypatch):
    monkeypatch.setattr(selection, "MAX_SELECTED", 5)
    decided = []
    original = selection.decide
    monkeypatch.setattr(selection, "decide", lambda *t: decided.append(t) or original(*t))
    for rows in (1, 2, 1, 2):
        fastlm.linear(X[:rows], W)
    assert len(decided) == 2
    for rows in range(1, 20):
        fastlm.linear(X[:1].expand(rows, 8), W)
    assert len(selection._selected) <= 5


def test_the_table_puts_pytorch_first_where_it_is_faster(selected, monkeypatch):
    rule = Rule("linear", "float32", {"rows": (None, 40), "out_width": (6, None)})
    monkeypatch.setattr(table, "cpu_rules", lambda: (rule,))
    before = dict(fastlm.info().fallbacks)
    assert selected() == "torch"
    assert fastlm.info().fallbacks == before  # the table's choice is no fallback
    elsewhere = "cpu" if cpu.kernels else "torch"
    for x, w in ((floats(41, 8), W), (X, floats(5, 8)), (X.bfloat16(), W.bfloat16())):
        sizes = Sizes(x.shape[0], 8, w.shape[0], False)
        assert selection.select(LINEAR, x, x.dtype, sizes, None).backend.name == elsewhere


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_small_calls_run_on_pytorchs_autograd(monkeypatch, reduction):
    """Their host time is PyTorch's; an autograd.Function would take longer than the arithmetic."""
    monkeypatch.undo()
    x, weight, target = floats(2, 16).requires_grad_(), floats(16, 16).requires_grad_(), torch.tensor([3, -100])
    vector = floats(16)
    normalised, summed = fastlm.layernorm_residual(x, x, weight[0], vector)
    assert torch.equal(summed, x + x)
    assert torch.equal(normalised, torch.nn.functional.layer_norm(x + x, (16,), weight[0], vector))
    logits = torch.nn.functional.linear(x, weight)
    assert torch.equal(fastlm.linear(x, weight), logits)
    loss = fastlm.linear_cross_entropy(x, weight, target, reduction=reduction)
    assert torch.equal(loss, torch.nn.functional.cross_entropy(logits, target, reduction=reduction))
    results = normalised, fastlm.linear(x, weight), loss
    assert not any(isinstance(result.grad_fn, torch.autograd.function.BackwardCFunction) for result in results)
    with pytest.raises(ValueError, match=r"target: expected values in \[0, 16\).*got 16 at \[1\]"):
        fastlm.linear_cross_entropy(x, weight, torch.tensor([3, 16]), reduction=reduction)


def test_the_users_own_table_replaces_the_one_that_comes_with_fastlm(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(table, "cpu_key", lambda: "zen9/avx512")
    monkeypatch.setitem(measured.CPUS, "zen9/avx512", (Rule("linear", "float32"),))
    read = read_cpu_rules
    assert read() == (Rule("linear", "float32"),)
    table.user_table().parent.mkdir()
    where = {"query_len": [1, 1], "key_len": [None, 64]}
    row = {"operator": "attention", "dtype": "bfloat16", "where": where}
    table.user_table().write_text(json.dumps({"zen9/avx512": [row]}))
    (rule,) = read()
    sizes = types.SimpleNamespace(query_len=1, key_len=64)
    assert rule.matches(ATTENTION, torch.bfloat16, sizes)
    assert not rule.matches(ATTENTION, torch.bfloat16, types.SimpleNamespace(query_len=2, key_len=64))
    assert not rule.matches(ATTENTION, torch.float32, sizes)
    table.user_table().write_text("{}")
    assert read() == (Rule("linear", "float32"),)


def test_rows_of_a_cpu_apply_only_with_the_instructions_they_were_measured_with(monkeypatch):
    """PyTorch's bfloat16 products are slow where a virtual machine hides instructions."""

    class Zen4:
        microarchitecture, has_amx = staticmethod(lambda: "zen4"), staticmethod(lambda: False)

    monkeypatch.setattr(table.isa, "features", lambda: Zen4)
    for usable, rows in ((["avx512_bf16", "avx512", "avx2", "baseline"], True), (["avx2", "baseline"], False)):
        monkeypatch.setattr(table.isa, "usable", lambda usable=usable: usable)
        sizes = Sizes(1024, 8, 8, False)
        assert any(rule.matches(LINEAR, torch.bfloat16, sizes) for rule in table.shipped_cpu_rules()) is rows


def test_the_summary_of_the_table(monkeypatch):
    monkeypatch.setattr(table, "cpu_key", lambda: "zen9/avx512")
    assert table.cpu_summary() == "zen9/avx512: cpu, torch, reference"
    rows = (
        Rule("linear", "bfloat16"),
        Rule("gelu_mlp", "float32", {"rows": (2, 40), "in_width": (512, None), "conv1d": (1, 1)}),
    )
    monkeypatch.setattr(table, "cpu_rules", lambda: rows)
    assert (
        table.cpu_summary()
        == "zen9/avx512: torch for linear in bfloat16; gelu_mlp in float32 (2 ≤ rows ≤ 40, 512 ≤ in_width, conv1d); "
        "otherwise cpu, torch, reference"
    )


def test_a_table_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table.user_table().parent.mkdir()
    table.user_table().write_text("{not json")
    with pytest.warns(
        RuntimeWarning, match=r"table.json: cannot be read \(.*\); the measurements that come with fastlm apply"
    ):
        assert read_cpu_rules() == table.shipped_cpu_rules()


def test_every_rule_that_comes_with_fastlm_names_sizes_that_exist():
    for device, tables in (
        ("cpu", (*measured.CPUS.values(), measured.WITH_AMX, measured.AMX_UNUSED)),
        ("cuda", measured.GPUS.values()),
    ):
        for rule in itertools.chain(*tables):
            assert table.parse_rule(dataclasses.asdict(rule), device) == rule


def test_the_backend_order_of_each_device(monkeypatch):
    asked = []

    def refuse(backend, device, dtype, sizes):
        asked.append(backend)
        return ["no"]

    monkeypatch.setattr(LINEAR, "refusals", refuse)
    for device, order in (
        ("mps", ["torch", "reference"]),
        ("cuda", ["triton", "cuda", "torch", "reference"]),
        ("cpu", ["cpu", "torch", "reference"]),
    ):
        asked.clear()
        with pytest.raises(fastlm.Unsupported):
            selection.decide(LINEAR, types.SimpleNamespace(type=device), torch.float32, None, Sizes(40, 8, 8, False))
        assert asked[: len(order)] == order
