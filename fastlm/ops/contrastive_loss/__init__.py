"""InfoNCE over L2-normalised embeddings, by chunks of similarity rows."""

from fastlm.ops.contrastive_loss.api import contrastive_loss

__all__ = ["contrastive_loss"]
