"""y = down(act(gate x) · up x): the gated feed-forward block."""

from fastlm.ops.glu_mlp.api import glu_mlp

__all__ = ["glu_mlp"]
