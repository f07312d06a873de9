"""Plots the loss curve."""

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
    """Draws the losses of a training run into an image file.

    Args:
        losses: of every step, starting at step 1.
        validation: (step, loss) pairs.
        plain: losses of the same model in plain PyTorch.

    Returns:
        False, without writing a file, if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError:
        return False
    from matplotlib.ticker import MaxNLocator

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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return True


def smoothed(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Moving average over `share` of the curve. The window shrinks towards both ends and stays centred, so that it
    introduces no delay.
    """
    max_radius = max(0, round(share * len(values) / 2))
    cumulative = list(itertools.accumulate(values, initial=0.0))
    out = []
    for i in range(len(values)):
        radius = min(max_radius, i, len(values) - 1 - i)
        out.append((cumulative[i + radius + 1] - cumulative[i - radius]) / (2 * radius + 1))
    return out
