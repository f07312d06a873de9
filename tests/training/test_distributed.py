"""Training in two and four processes against one process on the same batches.

Losses: those of several processes differ by the rounding of sums, which the updates carry on. ROUNDING is relative; it
is 100 times the rounding of float32, for 10 steps. float16 rounds the activations of another split of the batch.
Weights: by the 2 × rule, the distance to training in float64 is at most twice that of one process in float32, as a norm
over all weights. (Not of each: AdamW turns rounding into steps of the size of lr where a gradient is zero.)
"""

import functools
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from fastlm.training import scale
from fastlm.training.models import build
from tests.training import distributed_cases as cases
from tests.training.processes import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is tested on Linux")

ROUNDING = {"float16": 2e-3}
TWO = ["next-token,ddp", "next-token,fsdp", "masked-token,fsdp", "packed,ddp", "float16,fsdp", "skipping,fsdp"]
FOUR = ["next-token,ddp", "masked-token,fsdp"]
BYTES = {2: ["bytes,ddp", "bytes,fsdp", "bytes,fsdp,1"], 4: ["bytes,ddp", "bytes,fsdp"]}
ALL = [f"{name},{kind}" for name in cases.CASES for kind in cases.KINDS]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    """With the text, as documents of several lines."""
    folder = tmp_path_factory.mktemp("distributed")
    lines = text[:1600].splitlines()
    records = ["\n".join(lines[i : i + 5]) for i in range(0, len(lines), 5)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": record}) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """Runs in two processes, and the second part of a run that one process has begun."""
    assert cases.chained(folder, stop=cases.STOPS[1])["interrupted"]
    run_in(2, folder, *TWO, *BYTES[2], f"chained,ddp,{cases.STOPS[2]}")
    return folder


@pytest.fixture(scope="module")
def four(two):
    run_in(4, two, *FOUR, *BYTES[4], f"chained,fsdp,{cases.STOPS[4]}")
    return two


def run_in(count, folder, *jobs):
    run(count, "-m", "tests.training.distributed_cases", folder, *jobs, cwd=None)


@functools.cache
def alone(folder, name, dtype=None):
    """One process."""
    return cases.compared(folder, name, dtype=dtype)


def distance(one, other):
    return sum((one[name].double() - other[name].double()).square().sum() for name in one).sqrt().item()


def assert_same_run(folder, job, count):
    name, _ = job.split(",")
    found, expected = torch.load(folder / f"{job}-{count}.pt"), alone(folder, name)
    rounding = ROUNDING.get(name, 100 * torch.finfo(torch.float32).eps)
    assert len(found["losses"]) == 10
    assert found["losses"] == pytest.approx(expected["losses"], rel=rounding)
    assert found["norms"] == pytest.approx(expected["norms"], rel=10 * rounding)  # of differences of small numbers
    assert found["overflows"] == expected["overflows"]
    for ours, theirs in zip(found["evaluations"], expected["evaluations"], strict=True):
        assert ours == pytest.approx(theirs, rel=rounding)
    if name != "float16":
        exact = alone(folder, name, torch.float64)["weights"]
        assert distance(found["weights"], exact) <= 2 * distance(expected["weights"], exact)


@pytest.mark.parametrize("job", [job for job in TWO if "skipping" not in job])
def test_two_processes_train_as_one(two, job):
    assert_same_run(two, job, 2)


@pytest.mark.parametrize("job", FOUR)
def test_four_processes_train_as_one(four, job):
    assert_same_run(four, job, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "count", [2, pytest.param(3, marks=pytest.mark.nightly), pytest.param(4, marks=pytest.mark.nightly)]
)
def test_any_number_of_processes_trains_as_one(folder, count):
    run_in(count, folder, *ALL)
    for job in ALL:
        assert_same_run(folder, job, count)


@pytest.mark.slow
def test_other_models(folder):
    """Models of transformers, accelerated, and one with a parameter that has no gradient."""
    pytest.importorskip("transformers", reason="pip install 'fastlm[test]'")
    jobs = [f"{name},{kind}" for name in ("accelerated", "unused") for kind in cases.KINDS]
    run_in(2, folder, *jobs)
    for job in jobs:
        name, _ = job.split(",")
        found, expected = torch.load(folder / f"{job}-2.pt"), cases.run_job(folder, name)
        if name == "unused":  # with dropout, which each process draws
            assert max(found["losses"]) < 5 and found["losses"][0] == pytest.approx(expected["losses"][0], rel=0.05)
        else:
            assert found["losses"] == pytest.approx(expected["losses"], rel=100 * torch.finfo(torch.float32).eps)


@pytest.mark.slow
@pytest.mark.parametrize("kind", cases.KINDS)
def test_four_processes_go_on_to_the_same_bits(folder, kind):
    """The order of sums is the same after a restart."""
    run_in(4, folder, f"chained,{kind},0,whole", f"chained,{kind},7,parts")
    run_in(4, folder, f"chained,{kind},0,parts")
    found, expected = (torch.load(folder / f"chained,{kind},0,{name}-4.pt") for name in ("parts", "whole"))
    assert found["losses"] == expected["losses"] and found["evaluations"] == expected["evaluations"]
    assert all(torch.equal(x, expected["weights"][name]) for name, x in found["weights"].items())


@pytest.mark.nightly
def test_parts_are_cut_again_for_another_number_of_processes(folder):
    stops = {2: 5, 3: 10, 4: 15}
    for count, stop in stops.items():
        run_in(count, folder, f"chained,fsdp,{stop},cut")
    run_in(2, folder, "chained,fsdp,0,cut")
    found = torch.load(folder / "chained,fsdp,0,cut-2.pt")
    expected = cases.chained(folder, name="uncut")
    rounding = 200 * torch.finfo(torch.float32).eps  # 20 steps
    assert found["losses"] == pytest.approx(expected["losses"], rel=rounding)


@pytest.mark.slow
@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.nightly), 3])
def test_adapters(folder, count):
    pytest.importorskip("peft", reason="pip install 'fastlm[test]'")
    jobs = [f"adapted,{kind}" for kind in cases.KINDS]
    expected = cases.adapted(folder)
    run_in(count, folder, *jobs)
    rounding = 100 * torch.finfo(torch.float32).eps
    for job in jobs:
        found = torch.load(folder / f"{job}-{count}.pt")
        assert found["losses"] == pytest.approx(expected["losses"], rel=rounding)
        assert set(found["weights"]) == set(expected["weights"])
        assert len(found["samples"]) == 2
        for ours, theirs in zip(found["samples"], expected["samples"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
def test_adapters_go_on_with_another_number_of_processes(folder):
    """The checkpoints have the merged model."""
    pytest.importorskip("peft", reason="pip install 'fastlm[test]'")
    run_in(2, folder, "chained,fsdp,5,adapters")
    run_in(3, folder, "chained,fsdp,10,adapters")
    found, expected = cases.chained(folder, name="adapters"), cases.chained(folder, name="adapters-whole")
    assert found["losses"] == pytest.approx(expected["losses"], rel=200 * torch.finfo(torch.float32).eps)
    for name in ("step-00000018", "step-00000020"):
        merged = load_file(folder / "adapters" / "checkpoints" / name / "model.safetensors")
        whole = load_file(folder / "adapters-whole" / "checkpoints" / name / "model.safetensors")
        base = load_file(folder / "base" / "model.safetensors")
        assert distance(merged, whole) <= 1e-4 * distance(base, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", cases.KINDS)
def test_all_processes_end_at_a_checkpoint_that_one_could_not_write(folder, kind):
    run_in(2, folder, f"failing,{kind}")
    error = torch.load(folder / f"failing,{kind}-2.pt")
    assert "No space left on device" in error
    assert error.startswith("out: could not save the checkpoint") or kind == "ddp"
    assert [path.name for path in (folder / f"failing-{kind}" / "checkpoints").iterdir()] == ["step-00000003"]


def test_all_processes_skip_what_is_not_finite_in_one(two):
    found, expected = torch.load(two / "skipping,fsdp-2.pt"), cases.skipping(two)
    assert found["skipped"] == expected["skipped"] == [3, 5]
    finite = [i for i in range(10) if i != 2]
    rounding = 100 * torch.finfo(torch.float32).eps
    assert [found["losses"][i] for i in finite] == pytest.approx([expected["losses"][i] for i in finite], rel=rounding)


def test_a_run_goes_on_with_another_number_of_processes(four, tmp_path):
    """One, two (ddp), four (fsdp) and one process again. A signal to one process stops all at the same step."""
    for count, kind in ((2, "ddp"), (4, "fsdp")):
        found = torch.load(four / f"chained,{kind},{cases.STOPS[count]}-{count}.pt")
        assert found["interrupted"] and len(found["losses"]) == cases.STOPS[count]
    last = cases.chained(four)
    (tmp_path / "text.jsonl").write_bytes((four / "text.jsonl").read_bytes())
    whole = cases.chained(tmp_path)
    assert not last["interrupted"] and len(last["losses"]) == cases.CHAIN.steps
    rounding = 200 * torch.finfo(torch.float32).eps  # 20 steps
    assert last["losses"] == pytest.approx(whole["losses"], rel=rounding)
    assert [step for step, *_ in last["evaluations"]] == [step for step, *_ in whole["evaluations"]]
    assert distance(last["weights"], whole["weights"]) <= 1e-4 * distance(
        whole["weights"], {name: torch.zeros_like(x) for name, x in whole["weights"].items()}
    )


@pytest.mark.parametrize("count, job", [(count, job) for count, jobs in BYTES.items() for job in jobs])
def test_bytes_on_the_wire_are_those_of_the_model(four, count, job):
    """What gloo sends is at most 3 % more: headers, and the numbers that the processes agree on."""
    _, kind, *micro_batch = job.split(",")
    shapes = scale.shapes_of(build(cases.WIRE, cases.corpus_of(four, cases.WIRE).tokenizer))
    if kind == "ddp":
        expected = scale.ddp(*shapes, count).sent
    else:
        passes = 8 // count if micro_batch else 1
        expected = scale.fsdp(*shapes, count, passes, gloo=True).sent
    assert expected <= torch.load(four / f"{job}-{count}.pt") <= 1.03 * expected
