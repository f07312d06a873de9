"""pytest plugin: FASTLM_ACCELERATE=1 pytest -p fastlm.integrations.pytest_plugin PATH accelerates every eligible model right after its construction.

So transformers' own tests can be run against fastlm by anyone who has its source (tests/models/gpt2, bert, roberta, distilbert, …).
"""

import functools
import os
from typing import Any


def pytest_configure(config: Any) -> None:
    if os.environ.get("FASTLM_ACCELERATE") == "1":
        accelerate_after_construction()


def accelerate_after_construction() -> None:
    """Every model of a known family is accelerated at the end of its `__init__`, before weights are loaded into it."""
    import transformers

    from fastlm.integrations.transformers import accelerate

    post_init = transformers.PreTrainedModel.post_init

    @functools.wraps(post_init)
    def accelerated(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = post_init(self, *args, **kwargs)
        accelerate(self, strict=False)
        return result

    transformers.PreTrainedModel.post_init = accelerated  # type: ignore[method-assign]
