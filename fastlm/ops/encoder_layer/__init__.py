"""Post-norm encoder layers in one call of compiled code (csrc/cpu/encoder_layer.h).

It is not a public function. The backend `cpu` alone has it: elsewhere the operators are called one by one, with the
same result.
"""

from fastlm.ops.encoder_layer.spec import Layer, Layers

__all__ = ["Layer", "Layers"]
