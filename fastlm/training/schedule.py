"""Learning-rate schedule: linear warm-up, then cosine decay (Loshchilov & Hutter, 2017, arXiv:1608.03983)."""

import math


def learning_rate(step: float, *, lr: float, min_lr: float, warmup: float, decay_steps: float) -> float:
    """The learning rate of step 0, 1, …: rises to lr over `warmup` steps, decays to min_lr at step `decay_steps`."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)  # + 1: not 0 at step 0, and lr at step `warmup`
    if step >= decay_steps:
        return min_lr
    progress = (step - warmup) / (decay_steps - warmup)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2
