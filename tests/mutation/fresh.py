"""Runs tests against mutants of Python modules: `python -m tests.mutation.fresh PLAN OUT`.

The process imports PyTorch and pytest, but not fastlm; each mutant is a fork of it, in which an import hook loads the
mutated module.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import tempfile
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
    plan, out, outcomes = json.loads(Path(plan_file).read_text()), Path(out_file), {}
    assert "fastlm" not in sys.modules
    children = Children(plan["workers"])
    with tempfile.TemporaryDirectory() as folder:
        for number, mutant in plan["mutants"].items():
            path = Path(folder, number, Path(mutant["file"]).name)
            path.parent.mkdir()
            path.write_text(mutant["text"])
            result, log = Path(folder, f"{number}.json"), Path(folder, f"{number}.log")

            def body(mutant=mutant, path=path, log=log):
                os.environ.update(mutant["environment"])
                sys.meta_path.insert(0, Loads(mutant["module"], str(path)))
                written = os.open(log, os.O_WRONLY | os.O_CREAT)
                os.dup2(written, 1)
                os.dup2(written, 2)
                return int(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *mutant["arguments"]]))

            def done(status, number=number, result=result, log=log):
                code = json.loads(result.read_text()) if status == 0 else None
                if code == 0:
                    outcomes[number] = {"survived": True}
                elif code in (4, 5):
                    raise RuntimeError(f"pytest ended with {code}: {log.read_text()[-2000:]}")
                else:  # a test failed, or the module could not be imported, or the process crashed or was killed
                    outcomes[number] = {"killed": "time limit" if status is None else f"pytest {code}, status {status}"}
                out.write_text(json.dumps(outcomes))

            children.start(body, result, plan["seconds"], done)
        children.join()
    out.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
