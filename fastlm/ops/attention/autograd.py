"""How attention is differentiated."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastlm.ops.attention import reference, spec
from fastlm.ops.operator import Operator


class Attention(Operator):
    Forward, Backward, Sizes = spec.Forward, spec.Backward, spec.Sizes
    results, outputs, inputs = 2, 2, 4

    def save(self, call: spec.Forward, results: Any) -> tuple[Sequence[Tensor | None], tuple]:
        return (*call[:8], *results), call[8:14]

    def formula(self, call: spec.Backward) -> tuple[Callable[..., Any], Sequence[Tensor | None]]:
        def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            attributes = call.scale, call.softcap, call.lower, call.upper, call.dropout_p
            if call.cu_seqlens_q is None:
                out, lse = reference.attention(query, key, value, mask, call.key_padding, call.seed, *attributes)
            else:
                starts = call.cu_seqlens_q, call.cu_seqlens_k
                out, lse = reference.packed_attention(query, key, value, *starts, call.seed, *attributes)
            return out.to(query.dtype), lse

        return function, (call.query, call.key, call.value, call.mask)


operator = Attention("attention", __package__ or "")
