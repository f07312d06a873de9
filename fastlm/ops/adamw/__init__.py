"""The update of AdamW, which fastlm.optim.AdamW runs on its parameters. It is not a public function."""

from fastlm.ops.adamw.spec import operator

__all__ = ["operator"]
