// What the kernels receive besides their tensors; pointers to parameters are to float32 on the device that runs the
// kernel.
#pragma once

#include <cstdint>

#include "element_type.h"
#include "quantizer.h"

namespace gdfq {

// The ranges of a quantizer, one or one per channel.
struct Ranges {
  const float* lower;
  const float* upper;
  int bits;
  Scheme scheme;

  template <class Quantizer>
  GDFQ_HD Quantizer quantizer(std::int64_t c = 0) const {
    return Quantizer::make(lower[c], upper[c], bits, scheme);
  }
};

// Quantizers whose steps are learned, one or one per channel, and their codes.
struct LearnedSteps {
  const float* step;
  const float* zero_point;
  float lowest;
  float highest;

  GDFQ_HD StepQuantizer quantizer(std::int64_t c = 0) const {
    return {step[c] > 0.0f ? step[c] : NAN, fp32::subtract(lowest, zero_point[c]),
            fp32::subtract(highest, zero_point[c])};
  }
};

struct FrozenBatchNorm {
  const float* running_mean;
  const float* running_var;
  const float* weight;  // null: 1
  const float* bias;    // null: 0
  float epsilon;

  GDFQ_HD Affine affine(std::int64_t c) const {
    return make_affine(weight == nullptr ? 1.0f : weight[c], bias == nullptr ? 0.0f : bias[c], running_mean[c],
                       running_var[c], epsilon);
  }
};

// One layer's weight: `channels` consecutive pieces of `length` elements, each with a range of its own.
struct Weight {
  const void* values;
  void* quantized;
  ElementType type;
  std::int64_t channels;
  std::int64_t length;
  int bits;
  Scheme scheme;
};

}  // namespace gdfq
