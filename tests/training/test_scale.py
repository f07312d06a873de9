"""The bytes of the model are compared with those of real processes in test_distributed.py."""

from pathlib import Path

import pytest

from fastlm.training import scale
from fastlm.training.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


@pytest.mark.parametrize("preset", scale.VOCABULARIES)
def test_the_tables_of_the_page_are_those_of_the_model(preset):
    assert f"### {preset}\n\n{scale.table(preset)}\n" in PAGE.read_text()


def test_formulas():
    """By hand, for 3 processes: layers of 12 and a padded 5 → 6 rows of 2, others of 7 → 9."""
    layers, others = [[(12,)], [(5, 2)]], [(7,)]
    layers, others = [[scale.torch.Size(x) for x in layer] for layer in layers], [scale.torch.Size(x) for x in others]
    assert scale.ddp(layers, others, 3).sent == pytest.approx(2 * 2 / 3 * 4 * (12 + 10 + 7))
    expected = 2 / 3 * 4 * (2 * (2 * (12 + 12) + 9) + (12 + 12 + 9))
    assert scale.fsdp(layers, others, 3, micro_batches=2).sent == pytest.approx(expected)
    assert scale.ddp(layers, others, 1).sent == scale.fsdp(layers, others, 1).sent == 0


def test_what_computation_hides():
    settings = Settings(layers=2, width=64, context=64, batch=64)
    model = scale.new_model(settings, 100)
    slow = scale.Cluster(flops=1e9)  # everything but what comes last or first is hidden
    fast = scale.Cluster(flops=1e30)  # nothing is
    for kind in ("ddp", "fsdp"):
        hidden, open_ = (scale.step(model, settings, 8, kind, 8, cluster) for cluster in (slow, fast))
        assert open_.exposed == pytest.approx(open_.communication) and hidden.exposed <= open_.exposed
    assert (
        scale.step(model, settings, 8, "fsdp", 8, slow).exposed
        < scale.step(model, settings, 8, "fsdp", 8).communication
    )
