#pragma once

#include "device.h"
#include "element_type.h"

namespace gdfq::cuda {

// state: {average of minima, average of maxima, weight}, updated in place unless there are no elements.
// average: the two bias-corrected bounds.
void observe_range(const void* x, float* state, float* average, ElementType type, std::int64_t numel, double momentum,
                   const Device& device);

}  // namespace gdfq::cuda
