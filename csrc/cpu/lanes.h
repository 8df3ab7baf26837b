// Sums in an order of their own: in so many lanes, whatever the machine's vectors are, which are then added in halves.
// So the result is the same everywhere.
#pragma once

#include <cstdint>

#include "../kernels/quantizer.h"
#include "simd.h"

namespace gdfq::cpu {

constexpr std::int64_t kLanes = 16;

// Halving keeps the additions vectorizable, and their order fixed.
GDFQ_HD float add_lanes(float (&lanes)[kLanes]) {
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The sum of term(i) for 0 <= i < count.
template <class Term>
GDFQ_HD float sum_of(std::int64_t count, const Term& term) {
  float lanes[kLanes] = {};
  const std::int64_t whole = count - count % kLanes;
  for (std::int64_t begin = 0; begin < whole; begin += kLanes) {
    GDFQ_SIMD
    for (std::int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(begin + lane);
  }
  float sum = add_lanes(lanes);
  for (std::int64_t i = whole; i < count; ++i) sum += term(i);
  return sum;
}

}  // namespace gdfq::cpu
