"""`import fastlm` is light: what costs time is imported when it is needed."""

import os
import subprocess
import sys

import pytest

from fastlm.core.imports import after_import


def run(code):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FASTLM", "TRITON"))}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_fastlm_beside_torch_is_fast_and_does_not_import_triton():
    """The target is 0.1 s of CPU time; the bound leaves room for a busy machine."""
    code = """
import sys, time
import torch
before, loaded = time.process_time(), "triton" in sys.modules
import fastlm
print(time.process_time() - before, loaded or "triton" not in sys.modules)
"""
    seconds, without_triton = run(code)
    print(f"import fastlm took {float(seconds):.3f} s of CPU time")
    assert without_triton == "True"
    assert float(seconds) <= 0.3


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_flop_formulas_are_registered_whenever_the_flop_counter_is_imported(order):
    first, second = "import torch.utils.flop_counter", "import fastlm"
    code = f"""
import torch
{first if order == "before" else second}
{second if order == "before" else first}
x, w = torch.ones(6, 5, requires_grad=True), torch.ones(7, 5)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    fastlm.linear(x, w).sum().backward()
print(counter.get_total_flops())
"""
    assert run(code) == [str(2 * 2 * 6 * 5 * 7)]  # the product, and the gradient of x


def write_module(folder, monkeypatch, name="imported_later"):
    (folder / f"{name}.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_a_callback_runs_once_after_the_module_was_imported(tmp_path, monkeypatch):
    name, seen = write_module(tmp_path, monkeypatch), []
    finders = list(sys.meta_path)
    after_import(name, lambda: seen.append(sys.modules[name].value))
    after_import(name, lambda: seen.append("second"))
    assert not seen and name not in sys.modules
    __import__(name)
    assert sorted(map(str, seen)) == ["3", "second"]
    assert sys.meta_path == finders  # nothing stays behind
    __import__(name)
    assert len(seen) == 2
    monkeypatch.delitem(sys.modules, name)


def test_a_callback_for_an_imported_module_runs_at_once():
    seen = []
    after_import("sys", lambda: seen.append(1))
    assert seen == [1]


def test_a_module_that_does_not_exist_is_still_an_import_error():
    finders = list(sys.meta_path)
    after_import("a_module_that_does_not_exist", lambda: pytest.fail("called"))
    with pytest.raises(ModuleNotFoundError):
        __import__("a_module_that_does_not_exist")
    assert sys.meta_path == finders
