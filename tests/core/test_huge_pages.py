"""Large results on huge pages."""

import re
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm.core import huge_pages
from tests.support import BACKENDS


def advised_bytes(x):
    """The bytes of x in mappings that the process advised as huge pages."""
    begin, end, total = x.data_ptr(), x.data_ptr() + x.nbytes, 0
    for low, high, flags in re.findall(
        r"^(\w+)-(\w+) .*?^VmFlags:(.*?)$", Path("/proc/self/smaps").read_text(), re.MULTILINE | re.DOTALL
    ):
        if " hg" in flags:
            total += max(0, min(end, int(high, 16)) - max(begin, int(low, 16)))
    return total


@pytest.mark.skipif("cpu" not in BACKENDS, reason="not compiled here")
@pytest.mark.skipif(not huge_pages.PAGE, reason="this system uses huge pages always or never")
def test_large_results_ask_for_huge_pages():
    x = torch.ones(16 << 10, 768)  # 50 MB
    y, _ = fastlm.layernorm_residual(x, x, torch.ones(768), backend="cpu")
    assert y.nbytes - 2 * huge_pages.PAGE < advised_bytes(y) <= y.nbytes  # memory beside it is not advised


@pytest.mark.skipif(not huge_pages.PAGE, reason="this system uses huge pages always or never")
def test_small_results_are_not_advised():
    x = torch.empty(huge_pages.MIN_BYTES // 4 - 1)
    before = advised_bytes(x)
    assert huge_pages.on_huge_pages(x) is x and advised_bytes(x) == before


def test_systems_without_the_setting(monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    assert huge_pages.huge_page_bytes() == 0
    (tmp_path / "enabled").write_text("[always] madvise never\n")
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    assert huge_pages.huge_page_bytes() == 0
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert huge_pages.huge_page_bytes() == 2097152
