"""Learning-rate schedules: linear warm-up, then one of SCHEDULES.

cosine: Loshchilov & Hutter, 2017, arXiv:1608.03983. wsd (warm-up, stable, decay): Hu et al., 2024, arXiv:2404.06395,
with the decay 1 − √x that Hägele et al., 2024, arXiv:2405.18392, found best.
"""

import math

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def learning_rate(
    step: float,
    *,
    lr: float,
    min_lr: float,
    warmup: float,
    decay_steps: float,
    schedule: str = "cosine",
    decay_fraction: float = 0.2,
) -> float:
    """The learning rate of step 0, 1, …: rises to lr over `warmup` steps, decays to min_lr at step `decay_steps`.

    Args:
        schedule: "constant" keeps lr; "wsd" keeps lr until the last decay_fraction of decay_steps.
    """
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)  # + 1: not 0 at step 0, and lr at step `warmup`
    if schedule == "constant":
        return lr
    if step >= decay_steps:
        return min_lr
    start = max(warmup, decay_steps * (1 - decay_fraction)) if schedule == "wsd" else warmup
    progress = max(0.0, (step - start) / (decay_steps - start))
    if schedule == "linear":
        remaining = 1 - progress
    elif schedule == "wsd":
        remaining = 1 - math.sqrt(progress)
    else:
        remaining = (1 + math.cos(math.pi * progress)) / 2
    return min_lr + (lr - min_lr) * remaining
