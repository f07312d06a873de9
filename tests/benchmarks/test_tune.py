"""The search for launch configurations, on the CPU: Triton's interpreter, and made-up times."""

import pytest
import torch

from benchmarks import tune_triton as tune

pytest.importorskip("triton")
SMALL = {"batch": 1, "heads": 1, "tokens": 40}
FP32 = torch.float32


@pytest.fixture
def configs(monkeypatch):
    """Restored afterwards."""
    configs = tune.module("configs")
    monkeypatch.setattr(configs, "ATTENTION", {**configs.ATTENTION})
    monkeypatch.setattr(configs, "MLP", {**configs.MLP})
    return configs


@pytest.fixture
def made_up(monkeypatch):
    """The seconds of a value, from a function that a test sets. The value that is timed is the last one set."""
    turned, of = [], [lambda value: 1.0]

    def interleaved_calls(calls, device, **options):
        taken = {}
        for name, call in calls.items():
            call()
            taken[name] = [of[0](turned[-1]) * factor for factor in (1.0, 1.01, 0.99, 1.0)]
        return taken

    monkeypatch.setattr(tune, "interleaved_calls", interleaved_calls)

    def watch(knob):
        own = knob.set
        knob.set = lambda value: (turned.append(value), own(value))[1]
        return knob

    return watch, of


def search(knob):
    return list(tune.search(knob, "cpu", float("inf")))


def numbers(turned, others, value=4):
    return tune.Knob("n", value, others, turned.append, lambda: torch.ones(3))


def test_the_search_follows_the_best_value(made_up):
    watch, of = made_up
    of[0] = lambda n: abs(n - 11) + 1.0
    found = search(watch(numbers([], lambda best: [best - 1, best + 1, best + 3])))
    assert [trial.value for trial in found] == [3, 5, 7, 6, 8, 10, 9, 11, 13, 12, 14]
    best = tune.better(found)
    assert best.value == 11 and best.ratio.median == pytest.approx(8) and str(best) == "n: 11,  # 8.00 [8.00–8.00]"


def test_a_difference_within_the_spread_changes_nothing(made_up):
    watch, of = made_up
    of[0] = lambda n: 1.0 - 0.02 * (n == 5)
    found = search(watch(numbers([], lambda best: [3, 5])))
    assert len(found) == 2 and tune.better(found) is None


def test_time_runs_out(made_up):
    watch, _ = made_up
    assert list(tune.search(watch(numbers([], lambda best: [1, 2])), "cpu", until=0.0)) == []


def test_what_fails_is_left_out_with_the_reason(made_up, monkeypatch):
    watch, _ = made_up
    turned = []

    def call():
        if turned[-1] == 1:
            raise RuntimeError("out of resource: shared memory,\n Required: 300000")
        return torch.full((3,), 5.0 if turned[-1] == 2 else 1.0)

    class Spilling:
        n_spills = 12

    turned.append(4)
    knob = watch(tune.Knob("n", 4, lambda best: [1, 2, 3, 5], turned.append, call))
    compiled = tune.module("launch").compiled
    monkeypatch.setattr(
        knob, "call", lambda: (turned[-1] == 3 and compiled.update({(0, 0, 4, 1, ()): Spilling()}), call())[1]
    )
    found = {trial.value: trial for trial in search(knob)}
    assert {value: trial.note for value, trial in found.items()} == {
        1: "RuntimeError: out of resource: shared memory, Required: 300000",
        2: "gives other results",
        3: "spills 12 registers",
        5: "",
    }
    assert [found[n].ratio for n in (1, 2, 3)] == [None] * 3 and found[5].ratio and turned[-1] == 4 and not compiled


@pytest.mark.parametrize(
    "which",
    [
        "forward",
        "query",
        "key",
        "mask",
        "decode",
        "forward masked",
        "key masked",
        "query masked",
        "key exact",
        "query exact",
    ],
)
def test_a_pass_of_attention_is_launched_as_the_knob_says(which, configs, monkeypatch):
    """Each value is used by its own kernel alone, and does not change the results."""
    dtype = torch.bfloat16 if "exact" in which else FP32
    name = which.split()[0]
    sizes = SMALL if name != "decode" else SMALL | {"tokens": 300}
    launched = {}

    def launch(kernel, programs, arguments, constants, warps, stages, device, debug=False):
        if not (kernel.arg_names[-1] == "REPAIR" and constants[-1]):  # its second launch has one stage
            launched[kernel.__name__] = warps, stages
        own(kernel, programs, arguments, constants, warps, stages, device, debug)

    for name_of_module in ("attention", "attention_backward", "attention_decode"):
        module = tune.module(name_of_module)
        own = module.launch
        monkeypatch.setattr(module, "launch", launch)
    knob = tune.attention(which, dtype, 16, "cpu", **sizes)
    of = {"forward": "attention_forward_kernel", "decode": "attention_decode_kernel"}.get(
        name, f"attention_backward_{name}_kernel"
    )
    expected = tune.results(knob)
    before = dict(launched)
    m, n = (16, 16) if name == "decode" else (32, 32)
    knob.set((m, n, 7, 5))
    assert not tune.differ(tune.results(knob), expected)
    assert launched == before | {of: (7, 5)} != before
    knob.set(knob.value)
    tune.results(knob)
    assert launched == before


def test_tiles_are_neighbours_of_valid_sizes():
    near = tune.tiles((128, 64, 8, 3))
    assert (64, 64, 8, 3) in near and (128, 128, 4, 3) in near and (128, 64, 8, 2) in near
    assert all(
        m >= 16 and n >= 16 and m * n <= 128 * 128 and warps in (4, 8) and 1 <= stages <= 4
        for m, n, warps, stages in near
    )


def test_gelu_mlp_may_use_the_vendors_product(configs, made_up):
    watch, of = made_up
    of[0] = lambda value: 1.0 if value is None else 2.0
    at = "cpu", 4
    knob = watch(tune.gelu_mlp(FP32, "cpu", 20, 16))
    knob.others = lambda best: [None, (32, 32, 32, 1, 1)]
    found = search(knob)
    assert tune.better(found).value is None and not found[1].note and configs.MLP[at] == knob.value
    assert None in tune.gelu_mlp(FP32, "cpu", 20, 16).others(None)


@pytest.mark.parametrize("constant", ["ELEMENTS_PER_PROGRAM", "MAX_PARTIALS"])
def test_layernorm_residual(constant, configs, made_up, monkeypatch):
    watch, of = made_up
    kernels = tune.module("residual_norm")
    monkeypatch.setattr(kernels, constant, 64 if constant == "ELEMENTS_PER_PROGRAM" else 4)
    of[0] = lambda value: 1.0 / value
    knob = watch(tune.layernorm_residual(constant, FP32, "cpu", 9, 24))
    own = knob.others
    knob.others = lambda best: [value for value in own(best) if value <= 2 * knob.value]
    found = search(knob)
    assert [trial.value for trial in found] == [knob.value // 2, 2 * knob.value] and not any(
        trial.note for trial in found
    )
    assert tune.better(found).value == 2 * knob.value and getattr(kernels, constant) == knob.value


def test_every_pass_in_16_bits_is_searched_once_and_the_commonest_first(configs, monkeypatch):
    monkeypatch.setattr(tune, "attention", lambda which, dtype, head_dim, device: (which, dtype.itemsize, head_dim))
    monkeypatch.setattr(tune, "gelu_mlp", lambda *given: "gelu_mlp")
    monkeypatch.setattr(tune, "layernorm_residual", lambda *given: ("layernorm_residual", *given))
    found = list(tune.knobs("cpu"))
    assert found[:4] == [("forward", 2, 64), ("key", 2, 64), ("query", 2, 64), "gelu_mlp"] and len({*found}) == len(
        found
    )
    passes = {
        which
        for table in configs.ATTENTION.values()
        for which, itemsize, block in table
        if itemsize == 2 and block == 64 and not which.endswith(" copies")
    }
    assert {(which, 2, 64) for which in passes} <= {*found}


def test_where_bulk_copies_load_the_tiles_their_row_is_searched(configs, monkeypatch):
    from tests.kernels import interpreter  # which needs Triton, as the fixture does

    row = {("forward copies", 2, 64): (64, 32, 1, 1)}
    monkeypatch.setitem(configs.ATTENTION, "cpu", interpreter.TILES | row)
    monkeypatch.setattr(tune.backend, "architecture", lambda index: "cpu")
    knob = tune.attention("forward", torch.bfloat16, 16, "cpu", batch=1, heads=1, tokens=32)
    assert (knob.name, knob.value) == (str(("forward copies", 2, 64)), (64, 32, 1, 1))


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tune"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "error: triton finds no GPU" in capsys.readouterr().err
