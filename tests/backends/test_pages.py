"""Large results on huge pages."""

import re
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm.backends import pages
from tests.support import BACKENDS


def asked(x):
    """The bytes of x that lie where the process has asked for huge pages."""
    begin, end, total = x.data_ptr(), x.data_ptr() + x.nbytes, 0
    for low, high, flags in re.findall(
        r"^(\w+)-(\w+) .*?^VmFlags:(.*?)$", Path("/proc/self/smaps").read_text(), re.MULTILINE | re.DOTALL
    ):
        if " hg" in flags:
            total += max(0, min(end, int(high, 16)) - max(begin, int(low, 16)))
    return total


@pytest.mark.skipif("cpu" not in BACKENDS, reason="not compiled here")
@pytest.mark.skipif(not pages.PAGE, reason="this system gives huge pages always or never")
def test_large_results_ask_for_huge_pages():
    x = torch.ones(16 << 10, 768)  # 50 MB
    y, _ = fastlm.layernorm_residual(x, x, torch.ones(768), backend="cpu")
    assert y.nbytes - 2 * pages.PAGE < asked(y) <= y.nbytes  # what lies beside it is not ours to advise on


@pytest.mark.skipif(not pages.PAGE, reason="this system gives huge pages always or never")
def test_small_results_stay_as_they_come():
    x = torch.empty(pages.FRESH // 4 - 1)
    before = asked(x)
    assert pages.on_huge_pages(x) is x and asked(x) == before


def test_systems_that_do_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "SETTINGS", tmp_path)
    assert pages.page_bytes() == 0
    (tmp_path / "enabled").write_text("[always] madvise never\n")
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    assert pages.page_bytes() == 0
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert pages.page_bytes() == 2097152
