"""contrastive_loss by the triton implementation of linear_cross_entropy."""

from fastlm.ops.contrastive_loss.composition import by
from fastlm.ops.linear_cross_entropy import triton as loss

implementation = by(loss.implementation)
