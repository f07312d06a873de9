"""contrastive_loss by the cuda implementation of linear_cross_entropy."""

from fastlm.ops.contrastive_loss.composition import by
from fastlm.ops.linear_cross_entropy import cuda as loss

implementation = by(loss.implementation)
