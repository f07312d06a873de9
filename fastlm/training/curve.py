"""The loss curve as a picture."""

import itertools
from collections.abc import Sequence
from pathlib import Path


def draw_losses(
    path: Path,
    losses: Sequence[float],
    *,
    validation: Sequence[tuple[int, float]] = (),
    plain: Sequence[float] = (),
    unit: str = "nats per token",
) -> bool:
    """losses: of each step, from step 1; plain: of the same model on PyTorch's operators. False, and no file, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # a figure of its own: no window, no global state
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="batch")
    axes.plot(steps, smoothed(losses), color="#08519c", linewidth=1.8, label="batch, smoothed")
    if plain:
        axes.plot(
            range(1, len(plain) + 1),
            plain,
            color="#d94801",
            linestyle=(0, (4, 4)),
            linewidth=0.8,
            label="plain PyTorch, same batches",
        )
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#238b45", marker="o", linewidth=1.2, label="validation")
    axes.set(xlabel="step", ylabel=f"loss ({unit})", xlim=(0, len(losses) + 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return True


def smoothed(values: Sequence[float], share: float = 0.03) -> list[float]:
    """The mean of the values around each: `share` of the curve, fewer near its ends, so that a steep beginning is not drawn later than it was."""
    reach = max(0, round(share * len(values) / 2))
    total = list(itertools.accumulate(values, initial=0.0))
    out = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        out.append((total[i + near + 1] - total[i - near]) / (2 * near + 1))
    return out
