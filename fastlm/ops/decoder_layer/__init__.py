"""A decoder layer for the next token of every sequence, in one call of compiled code (csrc/cpu/decoder_layer.h).

It is not a public function. The backend `cpu` alone has it: elsewhere fastlm.models calls the operators one by
one, with the same result.
"""

from fastlm.ops.decoder_layer.spec import Layer, is_selected

__all__ = ["Layer", "is_selected"]
