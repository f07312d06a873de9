"""The learning rate at every step: linear warm-up, then half a cosine down to the least (Loshchilov & Hutter, 2017, arXiv:1608.03983)."""

import math


def learning_rate(step: float, *, lr: float, min_lr: float, warmup: float, decay_steps: float) -> float:
    """The rate of step 0, 1, …: rising through `warmup` steps to lr, min_lr from step `decay_steps` on."""
    if step < warmup:
        return (
            lr * (step + 1) / (warmup + 1)
        )  # + 1: step 0 learns too, and the first step after warm-up is the first at lr
    if step >= decay_steps:
        return min_lr
    progress = (step - warmup) / (decay_steps - warmup)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2
