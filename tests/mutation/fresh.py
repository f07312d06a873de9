"""Runs tests against mutants of Python modules: `python -m tests.mutation.fresh PLAN OUT`.

The process imports PyTorch and pytest, but not fastlm; each mutant is a fork of it, in which an import hook loads the
mutated module.
"""

import functools
import importlib.abc
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.mutation.plugin import Children


class Loads(importlib.abc.MetaPathFinder):
    """Finds one module at another path."""

    def __init__(self, module: str, path: str):
        self.module, self.path = module, path

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, self.path) if name == self.module else None


def main(plan_file: str, out_file: str) -> None:
    import pytest

    for name in ("numpy", "torch", "torch.utils.flop_counter"):
        importlib.import_module(name)
    plan, out = json.loads(Path(plan_file).read_text()), Path(out_file)
    assert "fastlm" not in sys.modules
    children = Children(plan["workers"])
    folder = Path(tempfile.mkdtemp(dir=out.parent))
    seconds: dict[str, float] = {}  # the tests of a mutant, as they take without it
    outcomes: dict[str, dict] = {}

    def start(number: str, run: dict, path: Path | None, limit: float, done) -> None:
        result, log = folder / f"{number}.json", folder / f"{number}.log"

        def body():
            os.environ.update(run["environment"])
            if path:
                sys.meta_path.insert(0, Loads(run["module"], str(path)))
            written = os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
            os.dup2(written, 1)
            os.dup2(written, 2)
            begin = time.monotonic()
            code = int(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *run["arguments"]]))
            return code, time.monotonic() - begin

        def ended(status):
            code, taken = json.loads(result.read_text()) if status == 0 else (None, 0.0)
            if code in (4, 5) or (path is None and code != 0):
                raise RuntimeError(f"pytest ended with {code}, status {status}: {log.read_text()[-3000:]}")
            done(code, taken, status)

        children.start(body, result, limit, ended)

    def tests_of(run: dict) -> str:
        return json.dumps([run["environment"], run["arguments"]])

    def keep(key: str, code: int, taken: float, status: int) -> None:
        seconds[key] = taken

    for number, mutant in plan["mutants"].items():
        key = tests_of(mutant)
        if key not in seconds:
            seconds[key] = 0.0
            start(f"without-{number}", mutant, None, 3000.0, functools.partial(keep, key))
    children.join()

    for number, mutant in plan["mutants"].items():
        path = folder / number / Path(mutant["file"]).name
        path.parent.mkdir()
        path.write_text(mutant["text"])

        def done(code, taken, status, number=number):
            if code == 0:
                outcomes[number] = {"survived": taken}
            else:  # a test failed, or the module could not be imported, or the process crashed or was killed
                outcomes[number] = {"killed": "time limit" if status is None else f"pytest {code}, status {status}"}
            out.write_text(json.dumps(outcomes))

        start(number, mutant, path, 60 + 5 * seconds[tests_of(mutant)], done)
    children.join()
    out.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
