#pragma once

#include <vector>

#include "../kernels/parameters.h"
#include "parallel.h"

namespace gdfq::cpu {

void fake_quantize_weights(const std::vector<Weight>& weights, const Parallel& parallel);

}  // namespace gdfq::cpu
