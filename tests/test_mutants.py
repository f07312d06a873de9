"""Does the suite notice? Kernels and operators are broken on purpose, one change at a time, and a test must fail.

Some twenty mutants are written by hand (tests/mutation/by_hand.py), the others are generated from the sources: a
dropped term, a flipped comparison, a shifted edge, a swapped minimum and maximum, a negated condition.
FASTLM_TEST_MUTANTS=hand takes those by hand and a few picked ones, sample (the default) a fixed sample of the generated
ones too, all takes all of them. `python -m tests.mutation.run --help` selects.
"""

import importlib.util
import math
import os
import shutil
import sys

import pytest

from tests.mutation import run

SCOPE = os.environ.get("FASTLM_TEST_MUTANTS", "sample")
assert SCOPE in ("hand", "sample", "all"), f"FASTLM_TEST_MUTANTS: expected hand, sample or all, got {SCOPE}"
# The share of generated mutants that may survive: 11 of 85 in the CPU kernels did before there were rules, and each of
# them changed no result. Whether a change is one can't be decided in general.
UNNOTICED = 0.05

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None,
    reason="mutants are compiled by GCC and run in forks, on Linux",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("cpu", marks=needs_compiler),
        pytest.param("cuda", marks=needs_compiler),
        pytest.param("triton", marks=pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")),
        "python",
    ],
)
def test_mutants_are_noticed(kind, tmp_path):
    """All of those by hand and the picked ones, and of the other generated ones all but the few that change no result
    and that no rule covers.
    """
    outcomes = run.run(kind, tmp_path, scope=SCOPE)
    unnoticed = run.unnoticed(outcomes)
    print(f"{len(unnoticed)} of {len(outcomes)} mutants were not noticed", *unnoticed, sep="\n")
    assert not run.unnoticed([(m, outcome) for m, outcome in outcomes if run.fixed(m)]), "\n".join(unnoticed)
    assert len(unnoticed) <= math.ceil(UNNOTICED * len(outcomes)), "\n".join(unnoticed)


def test_every_kernel_has_mutants():
    """A new kernel file has some in the sample, or a rule says why not."""
    for kind in ("cpu", "cuda", "triton"):
        with_mutants = {m.file for m in run.chosen(kind, "sample")}
        for pattern in run.GLOBS[kind]:
            for path in run.ROOT.glob(pattern):
                file = str(path.relative_to(run.ROOT))
                assert file in with_mutants or run.rules.of_file(file), f"{file} has no mutant"
    assert 15 <= sum(map(len, run.BY_HAND.values())) <= 25


def test_picked_mutants_are_those_that_were_meant():
    hand, sampled, every = (run.chosen("cpu", scope) for scope in ("hand", "sample", "all"))
    picked = {m.key: m for m in hand if m.kind != "by hand"}
    for key, source in run.by_hand.PICKED.items():
        begin = picked[key].edits[0][0]
        found = (run.ROOT / picked[key].file).read_text()[begin:]
        assert found.startswith(source), f"{key} is now at {found[:60]!r}: by_hand.PICKED needs another key"
    assert len(picked) == len(run.by_hand.PICKED) and {*hand} < {*sampled} < {*every}
    assert all(len({*mutations}) == len(mutations) for mutations in (hand, sampled, every))


def test_a_rename_breaks_none(tmp_path):
    """Other names and other lines: the same mutants by hand, and the same sample."""
    from tests.mutation import by_hand, cpp
    from tests.mutation.mutation import sample

    original = (run.ROOT / "csrc/cpu/adamw.h").read_text()
    renamed = "// another line\n" + original.replace("beta1", "decay_1").replace("tensors", "parameters")
    assert renamed.count("decay_1") and renamed.count("parameters")
    folder = tmp_path / "csrc" / "cpu"
    folder.mkdir(parents=True)
    (folder / "adamw.h").write_text(renamed)
    for ordinal, wanted in enumerate(by_hand.CPU):
        if wanted.files == "csrc/cpu/adamw.h":
            assert len(by_hand.found(tmp_path, wanted, ordinal)) == len(by_hand.found(run.ROOT, wanted, ordinal)) == 1
    before, after = (cpp.propose("csrc/cpu/adamw.h", text) for text in (original, renamed))
    assert [m.key for m in before] == [m.key for m in after]
    assert [m.key for m in sample(before, 5)] == [m.key for m in sample(after, 5)]
