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
    """Moving average over `share` of the curve, centred, so that it introduces no delay.

    Towards the start, where a loss falls steeply, the window shrinks. Where it would reach beyond the end, the value is
    that of the line through the last values.
    """
    count = len(values)
    max_radius = max(0, round(share * count / 2))
    cumulative = list(itertools.accumulate(values, initial=0.0))
    out = []
    for i in range(count):
        radius = min(max_radius, i)
        if i + radius < count:
            out.append((cumulative[i + radius + 1] - cumulative[i - radius]) / (2 * radius + 1))
    if len(out) < count:
        last = values[count - min(count, 2 * max_radius + 1) :]
        mean, middle = sum(last) / len(last), (len(last) - 1) / 2
        slope = sum((x - middle) * y for x, y in enumerate(last)) / sum((x - middle) ** 2 for x in range(len(last)))
        first = count - len(last)
        out += [mean + slope * (i - first - middle) for i in range(len(out), count)]
    return out
