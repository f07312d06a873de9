import os
from pathlib import Path

import pytest
import torch

import fastlm

# Where the package under test must lie, if someone (test_mutants.py) says so: another copy that happened to be found first would prove nothing.
if wanted := os.environ.get("FASTLM_TEST_PACKAGE"):
    assert Path(fastlm.__file__).is_relative_to(wanted), f"{fastlm.__file__} is not the package under test, which is in {wanted}"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
