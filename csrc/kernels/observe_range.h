#pragma once

#include <cstdint>

#include "element_type.h"
#include "kernel.h"

namespace gdfq {

// state: {average of minima, average of maxima, weight}, updated in place unless there are no elements.
// average: the two bias-corrected bounds.
GDFQ_KERNEL(observe_range, const void* x, float* state, float* average, ElementType type, std::int64_t numel,
            double momentum)

}  // namespace gdfq
