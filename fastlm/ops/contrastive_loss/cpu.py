"""contrastive_loss by the cpu implementation of linear_cross_entropy."""

from fastlm.ops.contrastive_loss.composition import by
from fastlm.ops.linear_cross_entropy import cpu as loss

implementation = by(loss.implementation)
