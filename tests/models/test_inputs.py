"""Unit tests of the checks; test_gpt2.py and test_bert.py test their messages through the models."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlm.models import inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("value, fits", [(0, True), (9, True), (10, False), (-1, False), (-100, False), (2**40, False)])
def test_range_of_ids(value, fits):
    given = torch.tensor([[3, value]])
    if fits:
        inputs.check_ids("x", given, below=10, device=CPU)
    else:
        with pytest.raises(ValueError, match=rf"^x: expected values in \[0, 10\), got {value}$"):
            inputs.check_ids("x", given, below=10, device=CPU)


def test_ignore_index():
    inputs.check_ids("labels", torch.tensor([-100, 3]), below=10, device=CPU, ignore_index=-100)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 10\) or -100, got -99"):
        inputs.check_ids("labels", torch.tensor([-100, -99, 3]), below=10, device=CPU, ignore_index=-100)


def test_values_are_not_read_from_fake_meta_and_empty_tensors():
    with FakeTensorMode():
        inputs.check_ids("x", torch.empty(2, 3, dtype=torch.long), below=0, device=CPU)
    meta = torch.empty(2, 3, dtype=torch.long, device="meta")
    inputs.check_ids("x", meta, below=0, device=meta.device)
    inputs.check_ids("x", torch.empty(0, 3, dtype=torch.long), below=10, device=CPU)


def test_attention_mask_of_any_dtype():
    for mask in (torch.tensor([[1, 0]]), torch.tensor([[True, False]]), torch.tensor([[1.0, 0.0]])):
        assert inputs.key_padding_mask(mask, 1, 2, CPU).tolist() == [[True, False]]
    assert inputs.key_padding_mask(None, 1, 2, CPU) is None
    with pytest.raises(ValueError, match="attention_mask: expected a tensor on cpu, as the model, got meta"):
        inputs.key_padding_mask(torch.empty(1, 2, device="meta"), 1, 2, CPU)
