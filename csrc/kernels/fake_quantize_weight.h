#pragma once

#include <vector>

#include "kernel.h"
#include "parameters.h"

namespace gdfq {

GDFQ_KERNEL(fake_quantize_weights, const std::vector<Weight>& weights)

}  // namespace gdfq
