#pragma once

#include <vector>

#include "device.h"
#include "parameters.h"

namespace gdfq::cuda {

void fake_quantize_weights(const std::vector<Weight>& weights, const Device& device);

}  // namespace gdfq::cuda
