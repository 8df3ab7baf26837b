#pragma once

#include <cstdint>

#include "../kernels/element_type.h"
#include "parallel.h"

namespace gdfq::cpu {

// state: {average of minima, average of maxima, weight}, updated in place unless there are no elements.
// average: the two bias-corrected bounds.
void observe_range(const void* x, float* state, float* average, ElementType type, std::int64_t numel, double momentum,
                   const Parallel& parallel);

}  // namespace gdfq::cpu
