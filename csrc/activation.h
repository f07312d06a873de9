// The activations of feed-forward blocks, by the number that Python passes (NUMBERS of fastlm/ops/activation.py).
#pragma once

namespace fastlm {

enum class activation_kind : int { silu, gelu, gelu_tanh, relu };

}  // namespace fastlm
