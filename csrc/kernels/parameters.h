// Frozen batch normalization as the kernels receive it: per-channel statistics and optional affine parameters.
#pragma once

#include <cstdint>

#include "../kernels/quantizer.h"

namespace gdfq::cpu {

struct FrozenBatchNorm {
  const float* running_mean;
  const float* running_var;
  const float* weight;  // null: 1
  const float* bias;    // null: 0
  float epsilon;

  Affine affine(std::int64_t c) const {
    return make_affine(weight == nullptr ? 1.0f : weight[c], bias == nullptr ? 0.0f : bias[c], running_mean[c],
                       running_var[c], epsilon);
  }
};

}  // namespace gdfq::cpu
