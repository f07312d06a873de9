"""A pytest plugin that accelerates every supported model at its construction, to run transformers' own tests on fastlm.

FASTLM_ACCELERATE=1 pytest -p fastlm.integrations.pytest_plugin path/to/transformers/tests/models/gpt2
"""

import functools
import os
from typing import Any


def pytest_configure(config: Any) -> None:
    if os.environ.get("FASTLM_ACCELERATE") == "1":
        accelerate_after_construction()


def accelerate_after_construction() -> None:
    """Models of supported families are accelerated at the end of `__init__`, before their weights are loaded."""
    import transformers

    from fastlm.integrations.api import accelerate

    post_init = transformers.PreTrainedModel.post_init

    @functools.wraps(post_init)
    def accelerated(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = post_init(self, *args, **kwargs)
        accelerate(self, strict=False)
        return result

    transformers.PreTrainedModel.post_init = accelerated  # type: ignore[method-assign]
