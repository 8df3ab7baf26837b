#pragma once

#include <cstdint>
#include <vector>

#include "kernel.h"

namespace gdfq {

// One BN layer: batch statistics and the teacher's, `channels` floats each.
struct LayerStatistics {
  const float* mean;
  const float* variance;
  const float* running_mean;
  const float* running_var;
  std::int64_t channels;
};

// gradient: of the means of all layers in order, then of the variances of all layers. average: over the channels of a
// layer, then over the layers, instead of the sum.
GDFQ_KERNEL(bns_loss, const std::vector<LayerStatistics>& layers, bool average, float* loss, float* gradient)

}  // namespace gdfq
