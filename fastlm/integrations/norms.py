"""Norms outside the layers, such as the one after the last layer, for families with a class of norms of their own."""

from typing import Any

from fastlm.integrations.families import Family
from fastlm.integrations.parts import NORMS, norm_reason
from fastlm.integrations.patch import Patch, observed_reason


class NormPatch(Patch):
    """The forward of such a norm."""

    def __init__(self, norm: Any, family: Family, options: dict[str, bool]) -> None:
        super().__init__(norm, options)
        self.family = family

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or observed_reason(args[0]) or self.reason():
            return self.original(*args, **kwargs)
        if args[0].dtype != self.module.weight.dtype:  # the result of some has the weight's dtype
            return self.original(*args, **kwargs)
        return NORMS[self.family.norm].run(self.module.__dict__, args[0], None)[0]

    def reason(self) -> str:
        return norm_reason(self.module, self.family)
