"""Every Triton kernel compiled ahead of time for GPUs that need not be here.

It compiles, its shared memory fits, tuned configurations spill no registers in the loops of their products, matrices
are multiplied by matrix instructions, each product once, and no product reads what an asynchronous copy may not have
written yet. No kernel divides 64-bit numbers element by element.

With another Triton in PYTHONPATH it is that which compiles.

By default a few configurations are compiled for one architecture. FASTLM_TEST_TARGETS=all (or names) compiles the most
common ones for all eight (or those), FASTLM_TEST_CONFIGURATIONS=all every configuration: both together are about 1300
compilations. FASTLM_TEST_CONFIGURATIONS=3/20 takes one in twenty of the less common ones, FASTLM_TEST_CASES=… those
with one of these parts, separated by commas, in their title. ahead_of_time.py has the launches.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlm.backends.triton import unfenced
from tests.kernels.support import kernel_modules, set_architecture
from tests.support import WITH_TRITON

HERE = Path(__file__).parent
ALL = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
WANTED = os.environ.get("FASTLM_TEST_TARGETS", "")
CONFIGURATIONS = os.environ.get("FASTLM_TEST_CONFIGURATIONS") or "none"
TARGETS = ALL if WANTED == "all" else tuple(WANTED.split(",")) if WANTED else ("sm_90",)
# Every kernel with all its optional arguments.
FEW = (
    "attention bfloat16 64 bias dropout",
    "attention bfloat16 64 decode",
    "layernorm_residual bfloat16 768 dropout float32 stream",
    "rms_norm_residual bfloat16 128 heads",
    "rms_norm_residual bfloat16 960 dropout float32 stream",
    "rotary bfloat16 128 partial",
    "gelu_mlp bfloat16 recompute 0",
    "glu_mlp bfloat16 silu recompute 1",
    "linear_cross_entropy bfloat16 bias softcap",
    "linear_log_prob bfloat16 bias softcap",
)
CASES = os.environ.get("FASTLM_TEST_CASES", "")
ONLY = FEW if CONFIGURATIONS == "none" and not WANTED else tuple(CASES.split(","))
MATRIX = {
    "sm_90": {"wgmma.mma_async", "mma.sync"},
    "sm_100": {"tcgen05.mma", "mma.sync"},
    "gfx942": {"mfma"},
    "gfx1100": {"wmma"},
}
WITHOUT_PRODUCTS = ("combine", "norm", "rotary", "activate", "slope", "cross_entropy", "log_prob")
# The table is tuned for head dims of 64 and 128 in 16 bits. The others, and float32, whose products have no matrix
# instruction at full precision, must compile and fit.
TUNED = ("float16 64", "float16 128")
# The widest row of LayerNorm and the partial sums of its weight gradients exceed the registers of a block: it spills.
SPILLS = {
    f"layernorm_residual {dtype} 16384": "layernorm_residual_backward_kernel"
    for dtype in ("bfloat16", "float16", "float32")
}

pytestmark = [pytest.mark.skipif(not WITH_TRITON, reason="needs Triton"), *([pytest.mark.slow] if ONLY != FEW else [])]


def listed():
    """(target, case, kernel) of all that this run compiles."""
    if not WITH_TRITON:
        return []
    from tests.kernels import ahead_of_time

    pairs = ahead_of_time.chosen(TARGETS, CONFIGURATIONS, ONLY)
    return [(target, title, kernel) for target, title in pairs for kernel in ahead_of_time.kernels_of(title, target)]


def refused_for_races(target):
    """Whether attention is refused on a target with this Triton."""
    import triton

    return unfenced(target, triton.__version__) != ""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(target, case, kernel) → the report, of all compilations in one process."""
    out = tmp_path_factory.mktemp("ahead_of_time") / "out.json"
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path]),
    }
    command = [
        sys.executable,
        str(HERE / "ahead_of_time.py"),
        str(out),
        *TARGETS,
        "--configurations",
        CONFIGURATIONS,
        "--only",
        *ONLY,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {(entry["target"], entry["case"], entry["kernel"]): entry for entry in json.loads(out.read_text())}


def test_the_slices_cover_all_configurations():
    from tests.kernels import ahead_of_time

    common, everything = (ahead_of_time.chosen(ALL, configurations) for configurations in ("none", "all"))
    shares = [ahead_of_time.chosen(ALL, f"{k}/20")[len(common) :] for k in range(20)]
    assert sorted(common + [pair for share in shares for pair in share]) == sorted(everything) and len(
        set(everything)
    ) == len(everything)
    assert {title for _, title in everything} == {title for title, _ in ahead_of_time.cases(False)}
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("target", ALL)
def test_every_row_of_the_tables_is_compiled_by_some_case(target, monkeypatch):
    from fastlm.kernels import configs
    from tests.kernels import ahead_of_time

    class Table(dict):
        def __getitem__(self, at):
            taken.add(at)
            return super().__getitem__(at)

    taken = set()
    table = configs.ATTENTION.get(target, configs.ONE_STAGE if target.startswith("gfx") else configs.SMALL)
    monkeypatch.setitem(configs.ATTENTION, target, Table(table))
    set_architecture(monkeypatch.setattr, target)
    for kernels in kernel_modules():
        monkeypatch.setattr(kernels, "launch", lambda *launch, **options: None)
    for title, call in ahead_of_time.cases(False):
        if title.startswith("attention"):
            call()
    assert taken == set(table)


@pytest.mark.parametrize("target, title, kernel", listed(), ids=lambda part: str(part).replace(" ", "_"))
def test_it_compiles_and_fits(target, title, kernel, compiled):
    entry = compiled[target, title, kernel]
    assert "error" not in entry, entry["error"]
    assert entry["shared"] <= entry["limit"], f"{entry['shared']} bytes of shared memory, of {entry['limit']}"
    assert entry["wide_divisions"] == 0, "64 bits are divided element by element, which no GPU has an instruction for"
    assert entry["read_late"] == 0, (
        "one element in 16 bits is read where other threads may have overwritten it: no barrier is in between"
    )
    if title.startswith("attention") and refused_for_races(target):
        return  # it runs nowhere
    assert entry["unfenced"] == 0, "a matrix product may read what an asynchronous copy has not written yet"
    if kernel.endswith("repair"):
        return  # it recomputes the tiles that have a NaN or an infinity
    tuned = any(tuned in title for tuned in TUNED) or not title.startswith("attention")
    if target.startswith("sm_") and tuned and SPILLS.get(title) != kernel:
        tiles = f"in tiles of {entry['constants']}, {entry['warps']} warps"
        products = not any(word in kernel for word in WITHOUT_PRODUCTS)
        spills = entry["spills_in_loops"] if products else entry["spilled"]
        assert spills == 0, f"{entry['spilled']} bytes on the stack {tiles}"
        assert entry["repeated"] == 1 or "decode" in kernel, (
            f"products are issued {entry['repeated']:.2f} times {tiles}"
        )
    if "float32 " not in title.replace("float32 stream", "") and not any(word in kernel for word in WITHOUT_PRODUCTS):
        assert set(entry["matrix"]) & MATRIX.get(target, {"mma.sync"}), entry["matrix"]


def test_the_targets_differ(compiled):
    """Each is compiled for its own architecture."""
    if len(TARGETS) > 1:
        matrix = {
            target: {tuple(e["matrix"]) for (t, _, _), e in compiled.items() if t == target and e.get("matrix")}
            for target in TARGETS
        }
        assert len({frozenset(found) for found in matrix.values()}) > 1
