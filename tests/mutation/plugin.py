"""pytest plugin: runs the collected tests against every mutant of a module, each mutant in a process of its own.

The first pass runs each test once without a mutant, and records its duration and the mutants that it executes. Then,
for each mutant, a forked process switches it on and runs the tests that execute it, the fastest first, until one fails.
Collection and imports happen once, so that a mutant costs little more than the test that notices it.

FASTLM_MUTATION_PLAN names a JSON file: the module's path, the numbers of the mutants, the CPU seconds of tests (as they
take without a mutant) that each may survive, and the number of processes at a time. FASTLM_MUTATION_OUT is where the
outcomes go.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest

LIMIT = 16384


class Switch:
    def __init__(self, module: str):
        library = ctypes.CDLL(module)
        self.active = ctypes.c_int.in_dll(library, "fastlm_mutant")
        self.reached = (ctypes.c_ubyte * LIMIT).in_dll(library, "fastlm_mutants_reached")

    def take_reached(self) -> dict[int, int]:
        marks = {number: mark for number, mark in enumerate(bytes(self.reached)) if mark}
        ctypes.memset(self.reached, 0, LIMIT)
        return marks


class Outcome:
    """Whether the last test failed."""

    failed = False

    def pytest_runtest_logreport(self, report):
        self.failed |= report.failed


def run_item(item, following, outcome) -> bool:
    outcome.failed = False
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    return outcome.failed


def in_child(body, result: Path) -> int:
    """Runs body() in a forked process, which writes what it returns to `result`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        written = json.dumps(body())
        partial = result.with_name(f"{result.name}.partial")  # one for each result: several processes write at a time
        partial.write_text(written)
        partial.rename(result)
        status = 0
    finally:
        os._exit(status)


class Children:
    """At most `workers` processes at a time; one that takes longer than its limit is killed."""

    def __init__(self, workers: int):
        self.workers = workers
        self.running: dict[int, tuple[float, object]] = {}

    def wait(self, below: int) -> None:
        while len(self.running) >= max(below, 1):
            for pid, (deadline, done) in list(self.running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended and time.monotonic() > deadline:
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    ended, status = pid, None
                if ended:
                    del self.running[pid]
                    done(status)
            time.sleep(0.01)

    def start(self, body, result: Path, seconds: float, done) -> None:
        self.wait(self.workers)
        self.running[in_child(body, result)] = (time.monotonic() + seconds, done)

    def join(self) -> None:
        self.wait(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    plan = json.loads(Path(os.environ["FASTLM_MUTATION_PLAN"]).read_text())
    out = Path(os.environ["FASTLM_MUTATION_OUT"])
    if session.testsfailed:
        raise session.Failed("collection failed")
    switch, outcome, items = Switch(plan["module"]), Outcome(), session.items
    session.config.pluginmanager.register(outcome)
    workers = plan["workers"]
    children = Children(workers)

    def baseline(share):
        table = []
        for at in range(share, len(items), workers):
            switch.take_reached()
            begin = time.process_time()  # of the CPU, which does not depend on what else the machine does
            failed = run_item(items[at], items[at + workers] if at + workers < len(items) else None, outcome)
            table.append([at, time.process_time() - begin, failed, switch.take_reached()])
        return table

    def must_succeed(status):
        if status != 0:
            raise RuntimeError(f"the tests ended with status {status} without a mutant")

    shares = [out.with_name(f"{out.name}.baseline{share}") for share in range(workers)]
    for share, result in enumerate(shares):
        children.start(lambda share=share: baseline(share), result, 3000, must_succeed)
    children.join()
    table = [entry for result in shares for entry in json.loads(result.read_text())]
    failing = [items[at].nodeid for at, _, failed, _ in table if failed]
    if failing and not plan["ignore_failing"]:
        raise RuntimeError(f"these tests fail without a mutant: {failing}")
    by_mutant: dict[int, list[tuple[float, int]]] = {number: [] for number in plan["mutants"]}
    marks: dict[int, int] = {}
    for at, seconds, failed, reached in table:
        for number, mark in reached.items():
            marks[int(number)] = max(marks.get(int(number), 0), 3 - mark)  # 2: it has a meaning, 1: it has none
            if mark == 1 and int(number) in by_mutant and not failed:
                by_mutant[int(number)].append((seconds, at))

    if not marks:
        raise RuntimeError(f"no test executes {plan['module']}")
    outcomes: dict[int, dict] = {}

    def hunt(number, tests):
        switch.active.value = number
        for position, at in enumerate(tests):
            if run_item(items[at], items[tests[position + 1]] if position + 1 < len(tests) else None, outcome):
                return {"killed": items[at].nodeid}
        return {"survived": len(tests)}

    for number, reaching in by_mutant.items():
        if not reaching:
            outcomes[number] = {"not_applicable" if marks.get(number) == 1 else "unreached": True}
            continue
        tests, budget = [], plan["seconds"] if number not in plan["thorough"] else math.inf
        for seconds, at in sorted(reaching):  # one test at least, however long it takes
            if seconds < budget or not tests:
                tests.append(at)
                budget -= seconds
        result = out.with_name(f"{out.name}.{number}")

        def done(status, number=number, result=result):
            if status == 0:
                outcomes[number] = json.loads(result.read_text())
                result.unlink()
            else:  # it crashed, or it ran for too long: no test run passes with it
                outcomes[number] = {"killed": "time limit" if status is None else f"status {status}"}
            out.write_text(json.dumps(outcomes))

        children.start(lambda n=number, t=tests: hunt(n, t), result, 20 * plan["seconds"] + 240, done)
    children.join()
    out.write_text(json.dumps(outcomes))
    return True
