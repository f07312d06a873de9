import copy
import pickle

import pytest
import torch

from fastlm.models.outputs import HeadOutput, ModelOutput


def test_access_by_attribute_key_and_index():
    loss, logits = torch.zeros(()), torch.ones(2)
    output = HeadOutput(loss, logits)
    assert output.loss is output["loss"] is output[0] is output.get("loss") is loss
    assert output.to_tuple() == output[:2] == (loss, logits) == output.values()
    assert list(output) == list(output.keys()) == ["loss", "logits"]
    assert dict(output.items()) == {"loss": loss, "logits": logits}
    assert len(output) == 2 and "logits" in output and "past_key_values" not in output


def test_none_fields_are_absent():
    output = HeadOutput(loss=torch.zeros(()))
    assert output.logits is None and output.get("logits", 5) == 5 and len(output) == 1
    with pytest.raises(KeyError, match="logits"):
        output["logits"]
    with pytest.raises(IndexError):
        output[1]


def test_methods_are_not_keys():
    output = ModelOutput(torch.ones(1))
    assert "keys" not in output
    with pytest.raises(KeyError):
        output["keys"]


def test_copies():
    output = ModelOutput(torch.ones(2), torch.zeros(2))
    for other in (copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert type(other) is ModelOutput and torch.equal(other.last_hidden_state, output.last_hidden_state)
