"""The loss curve as a picture."""

from collections.abc import Sequence
from pathlib import Path


def draw_losses(
    path: Path, losses: Sequence[float], *, validation: Sequence[tuple[int, float]] = (), plain: Sequence[float] = (), unit: str = "nats per token"
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
        axes.plot(range(1, len(plain) + 1), plain, color="#d94801", linestyle="--", linewidth=1.6, label="plain PyTorch, same batches")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#238b45", marker="o", linewidth=1.2, label="validation")
    axes.set(xlabel="step", ylabel=f"loss ({unit})", xlim=(0, len(losses) + 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return True


def smoothed(values: Sequence[float], share: float = 0.05) -> list[float]:
    """A running mean that forgets within `share` of the curve, without the pull towards the first value that a plain one has."""
    keep = max(0.0, 1 - 1 / max(1.0, share * len(values)))
    mean = weight = 0.0
    out = []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
