#pragma once

#include "kernel.h"
#include "parameters.h"

namespace gdfq {

// Which elements stay as they are: those whose byte is less than the threshold.
struct Choice {
  const std::uint8_t* bytes;  // one for each element; null: none stays, and the threshold is 0
  int threshold;

  Choice from(std::int64_t element) const { return {bytes == nullptr ? nullptr : bytes + element, threshold}; }
};

// d (level * step) / d step of an element, with its place in steps passed through the rounding.
template <class AnyStepQuantizer>
GDFQ_HD float slope_of_step(float steps, float level, const AnyStepQuantizer& quantizer) {
  return is_inside(level, quantizer) ? fp32::subtract(level, steps) : clamp_level(level, quantizer);
}

GDFQ_KERNEL(fake_quantize_learned, const void* x, void* y, ElementType type, std::int64_t numel,
            const LearnedSteps& learned, const Choice& choice)

// scale: of grad_step.
GDFQ_KERNEL(fake_quantize_learned_backward, const void* grad_y, const void* x, void* grad_x, float* grad_step,
            ElementType type, std::int64_t numel, const LearnedSteps& learned, const Choice& choice, double scale)

}  // namespace gdfq
