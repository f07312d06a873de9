// The activations of feed-forward blocks with their derivatives, in float32.
#pragma once
#include "../activation.h"
#include "vec.cuh"

namespace fastlm::cuda {

struct activation_result {
  float value, slope;
};

// ½ (1 + tanh(t)) = 1 / (1 + exp(−2t)), which has no cancellation.
FASTLM_DEVICE activation_result gelu(float x, bool tanh) {
  if (tanh) {
    const float half = 1.0f / (1.0f + exp_(-1.5957691216057308f * x * (1.0f + 0.044715f * x * x)));
    return {x * half, half + x * half * (1.0f - half) * 1.5957691216057308f * (1.0f + 0.134145f * x * x)};
  }
  const float half = 0.5f * (1.0f + erf_(x * 0.7071067811865476f));
  return {x * half, half + x * exp_(-0.5f * x * x) * 0.3989422804014327f};
}

FASTLM_DEVICE activation_result activate(float x, activation_kind activation) {
  if (activation == activation_kind::silu) {
    const float sigmoid = 1.0f / (1.0f + exp_(-x)), value = x * sigmoid;
    return {value, sigmoid + value * (1.0f - sigmoid)};
  }
  if (activation == activation_kind::relu) return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};  // NaN stays NaN
  return gelu(x, activation == activation_kind::gelu_tanh);
}

}  // namespace fastlm::cuda
