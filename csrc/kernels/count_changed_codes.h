#pragma once

#include <cstdint>
#include <vector>

#include "kernel.h"
#include "quantizer.h"

namespace gdfq {

constexpr int kMostKappas = 16;

// One layer's weight and the direction of its step, both in `channels` consecutive pieces of `length` elements.
struct WeightStep {
  const float* weight;
  const float* direction;
  std::int64_t channels;
  std::int64_t length;
  int bits;
  Scheme scheme;
};

// An element's code, the level that it is stored as.
template <class AnyQuantizer>
GDFQ_HD float code_of(float x, const AnyQuantizer& quantizer) {
  return clamp_level(round_to_level(x, quantizer), quantizer);
}

GDFQ_HD float step(float weight, float size, float direction) {
  return fp32::subtract(weight, fp32::multiply(size, direction));
}

// counts: (weights, kappas), how many codes of a weight change in a step of kappa * learning_rate.
GDFQ_KERNEL(count_changed_codes, const std::vector<WeightStep>& weights, const float* learning_rate,
            const float* kappas, int count, std::int64_t* counts)

}  // namespace gdfq
