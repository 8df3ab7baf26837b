#pragma once

#include <cstdint>
#include <vector>

#include "element_type.h"
#include "parallel.h"

namespace gdfq::cpu {

// One layer's weight: `channels` consecutive pieces of `length` elements, each with a range of its own.
struct Weight {
  const void* values;
  void* quantized;
  ElementType type;
  std::int64_t channels;
  std::int64_t length;
  int bits;
};

void fake_quantize_weights(const std::vector<Weight>& weights, const Parallel& parallel);

}  // namespace gdfq::cpu
