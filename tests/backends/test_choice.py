import concurrent.futures
import dataclasses
import itertools
import subprocess
import sys
import types

import pytest
import torch

import fastlm
from fastlm.backends import choice, cpu, table
from tests.support import floats

X, W = floats(40, 8), floats(6, 8)
RULES = table.rules.__wrapped__  # as it reads them, not what it remembers


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch):
    """The choice by rank alone, whatever is the faster on this CPU; the table has its own tests."""
    monkeypatch.setattr(table, "rules", lambda: ())
    choice.CHOICES.clear()
    yield
    choice.CHOICES.clear()


def serves(**options):
    """Who served a call, by name: each backend's forward is watched."""
    served = []
    for name in ("cpu", "torch", "reference"):
        module = choice.load(name)
        original = module.linear_forward
        module.linear_forward = lambda *t, name=name, original=original: served.append(name) or original(*t)
        options.setdefault("undo", []).append((module, original))
    undo = options.pop("undo")
    try:
        fastlm.linear(X, W, **options)
    finally:
        for module, original in undo:
            module.linear_forward = original
    return served[0]


def test_precedence_argument_then_context_then_environment_then_auto(monkeypatch):
    automatic = serves()
    assert automatic == ("cpu" if cpu.kernels else "torch")
    monkeypatch.setattr(choice, "from_environment", "reference")
    assert serves() == "reference"
    with fastlm.use_backend("torch"):
        assert serves() == "torch"
        assert serves(backend="reference") == "reference"
        with fastlm.use_backend("reference"):
            assert serves() == "reference"
        assert serves() == "torch"
    assert serves() == "reference"


def test_none_gives_the_choice_back():
    automatic = serves()
    with fastlm.use_backend("reference"), fastlm.use_backend(None):
        assert serves() == automatic


def test_the_environment_variable():
    code = "import fastlm, torch; x = torch.ones(2, 2); {}"
    run = lambda name, code: subprocess.run(  # noqa: E731
        [sys.executable, "-W", "ignore", "-c", code],
        env={"FASTLM_BACKEND": name, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    done = run("cuda", code.format("fastlm.linear(x, x)"))
    assert "Unsupported: linear on cpu in torch.float32 with backend='cuda'" in done.stderr
    done = run("gpu", code.format("fastlm.linear(x, x)"))
    assert "ValueError: FASTLM_BACKEND: expected one of cpu, triton, cuda, torch, reference, got 'gpu'" in done.stderr


def test_a_context_is_left_on_an_error_and_belongs_to_its_thread():
    with pytest.raises(KeyError), fastlm.use_backend("torch"):
        raise KeyError
    assert choice.requested(None) is None
    with fastlm.use_backend("reference"), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(choice.requested, None).result() is None
        assert choice.requested(None) == "reference"


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
    assert y.grad_fn.backend is choice.load("reference")


def test_names_are_checked():
    for name in ("gpu", "CPU", ""):
        with (
            pytest.raises(
                ValueError, match=f"backend: expected one of cpu, triton, cuda, torch, reference, got '{name}'"
            ),
            fastlm.use_backend(name),
        ):
            pass


def test_an_error_lists_every_backend_with_its_reasons():
    message = (
        r"linear on cpu in torch.float64 with backend='cpu': "
        r"cpu (computes in torch.float32, torch.bfloat16, torch.float16, not torch.float64|is not compiled.*); "
        r"triton .*; cuda .*; torch could, but another was forced; reference could, but another was forced"
    )
    with pytest.raises(fastlm.Unsupported, match=message):
        fastlm.linear(X.double(), W.double(), backend="cpu")


def test_a_forced_backend_never_falls_back():
    with (
        fastlm.use_backend("torch"),
        pytest.raises(fastlm.Unsupported, match="torch draws its dropout masks otherwise than fastlm"),
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


def test_choices_are_remembered_and_bounded(monkeypatch):
    monkeypatch.setattr(choice, "MOST_CHOICES", 5)
    choice.CHOICES.clear()
    decided = []
    original = choice.decide
    monkeypatch.setattr(choice, "decide", lambda *t: decided.append(t) or original(*t))
    for rows in (1, 2, 1, 2):
        fastlm.linear(X[:rows], W)
    assert len(decided) == 2
    for rows in range(1, 20):
        fastlm.linear(X[:1].expand(rows, 8), W)
    assert len(choice.CHOICES) <= 5


def test_the_table_puts_pytorch_first_where_it_is_faster(monkeypatch):
    rule = table.Rule("linear", "float32", {"rows": (None, 40), "out_width": (6, None)})
    monkeypatch.setattr(table, "rules", lambda: (rule,))
    choice.CHOICES.clear()
    try:
        before = dict(fastlm.info().fallbacks)
        assert serves() == "torch"
        assert fastlm.info().fallbacks == before  # the table's choice is no fallback
        wide = "cpu" if cpu.kernels else "torch"
        for x, w in ((floats(41, 8), W), (X, floats(5, 8)), (X.bfloat16(), W.bfloat16())):
            assert choice.choose("linear", x, x.dtype, None, x.shape[0], 8, w.shape[0], False) is choice.load(wide)
    finally:
        choice.CHOICES.clear()


def test_the_users_own_table_replaces_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(table, "cpu", lambda: "zen9/avx512")
    monkeypatch.setitem(table.MEASURED, "zen9/avx512", (table.Rule("linear", "float32"),))
    read = RULES
    assert read() == (table.Rule("linear", "float32"),)
    table.user_table().parent.mkdir()
    table.user_table().write_text(
        '{"zen9/avx512": [{"operator": "attention", "dtype": "bfloat16", "where": {"query_len": [1, 1], "key_len": [null, 64]}}]}'
    )
    (rule,) = read()
    assert rule.holds("attention", "bfloat16", {"query_len": 1, "key_len": 64})
    assert not rule.holds("attention", "bfloat16", {"query_len": 2, "key_len": 64})
    assert not rule.holds("attention", "float32", {"query_len": 1, "key_len": 64})
    table.user_table().write_text("{}")
    assert read() == (table.Rule("linear", "float32"),)


def test_a_cpu_that_hides_instructions_has_rows_of_its_own(monkeypatch):
    """PyTorch's bfloat16 products are slow without the instructions that its rows were measured with."""

    class Zen4:
        microarchitecture, has_amx = staticmethod(lambda: "zen4"), staticmethod(lambda: False)

    monkeypatch.setattr(table.isa, "features", lambda: Zen4)
    for usable, rows in ((["avx512_bf16", "avx512", "avx2", "baseline"], True), (["avx2", "baseline"], False)):
        monkeypatch.setattr(table.isa, "usable", lambda usable=usable: usable)
        assert any(rule.holds("linear", "bfloat16", {"rows": 1024}) for rule in table.shipped()) is rows


def test_the_rows_in_words(monkeypatch):
    monkeypatch.setattr(table, "cpu", lambda: "zen9/avx512")
    monkeypatch.setattr(table, "rules", lambda: ())
    assert table.in_words() == "zen9/avx512: fastlm's kernels serve whatever they can"
    rows = (
        table.Rule("linear", "bfloat16"),
        table.Rule("gelu_mlp", "float32", {"rows": (2, 40), "in_width": (512, None), "conv1d": (1, 1)}),
    )
    monkeypatch.setattr(table, "rules", lambda: rows)
    assert (
        table.in_words()
        == "zen9/avx512: PyTorch serves linear in bfloat16; gelu_mlp in float32 (2 ≤ rows ≤ 40, 512 ≤ in_width, conv1d)"
    )


def test_a_table_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table.user_table().parent.mkdir()
    table.user_table().write_text("{not json")
    with pytest.warns(
        RuntimeWarning, match=r"table.json: cannot be read \(.*\); the measurements that come with fastlm hold"
    ):
        assert RULES() == table.shipped()


def test_every_rule_that_comes_with_fastlm_names_features_that_exist():
    for device, tables in (
        ("cpu", (*table.MEASURED.values(), table.WITH_AMX, table.AMX_UNUSED)),
        ("cuda", table.GPUS.values()),
    ):
        for rule in itertools.chain(*tables):
            assert table.rule_of(dataclasses.asdict(rule), device) == rule


def test_elsewhere_pytorch_comes_first_and_on_a_gpu_the_kernels_do():
    asked = []

    def watch(name, operator, device, dtype, features):
        asked.append(name)
        return ["no"]

    original, choice.refusals = choice.refusals, watch
    try:
        for device, order in (
            ("mps", ["torch", "reference"]),
            ("cuda", ["triton", "cuda", "torch", "reference"]),
            ("cpu", ["cpu", "torch", "reference"]),
        ):
            asked.clear()
            with pytest.raises(fastlm.Unsupported):
                choice.decide("linear", types.SimpleNamespace(type=device), torch.float32, None, {"rows": 40})
            assert asked[: len(order)] == order
    finally:
        choice.refusals = original
