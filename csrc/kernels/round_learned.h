#pragma once

#include "kernel.h"
#include "parameters.h"

namespace gdfq {

// AdaRound's weight, its parts and what is learned, as `channels` consecutive pieces of `length` elements.
struct SoftWeight {
  const float* base;
  const float* v;
  std::int64_t channels;
  std::int64_t length;
  LearnedSteps learned;
  const float* sharpness;
};

// How far an element is rounded up, and the derivative by v, from sigmoid(v).
struct SoftRounding {
  float up;
  float slope;
};

GDFQ_HD SoftRounding soft_rounding(float sigmoid) {
  const float stretched = 1.2f * sigmoid - 0.1f;
  const bool clamped = (stretched <= 0.0f) | (stretched >= 1.0f);
  return {fp32::at_most(fp32::at_least(stretched, 0.0f), 1.0f), clamped ? 0.0f : 1.2f * sigmoid * (1.0f - sigmoid)};
}

// What the penalty is a power of: 0 halfway, -1 and 1 where the element is rounded down and up.
GDFQ_HD float centered(const SoftRounding& rounding) { return 2.0f * rounding.up - 1.0f; }

// The derivatives of grad_y * y + grad_penalty * penalty by v and by step. of_penalty = 2 * grad_penalty * sharpness
// and power = |centered|^(sharpness - 1).
struct SoftGradient {
  float v;
  float step;
};

GDFQ_HD SoftGradient soft_gradient(float grad_y, float of_penalty, float base, const SoftRounding& rounding,
                                   float power, const StepQuantizer& quantizer) {
  const float level = base + rounding.up;
  const float of_level = is_inside(level, quantizer) ? grad_y * quantizer.step : 0.0f;
  const float side = centered(rounding);
  // Halfway there is no slope, and power, of 0, may be NaN.
  const float signed_power = side > 0.0f ? power : side < 0.0f ? -power : 0.0f;
  return {(of_level - of_penalty * signed_power) * rounding.slope, grad_y * clamp_level(level, quantizer)};
}

GDFQ_KERNEL(round_learned, const SoftWeight& weight, float* y, float* penalty)

GDFQ_KERNEL(round_learned_backward, const float* grad_y, const float* grad_penalty, const SoftWeight& weight,
            float* grad_v, float* grad_step)

}  // namespace gdfq
