// The least and the greatest of some elements; NaN if any of them is NaN.
#pragma once

#include <cstdint>
#include <limits>

#include "../kernels/element_type.h"
#include "channels.h"
#include "simd.h"

namespace gdfq::cpu {

struct Range {
  float lower = std::numeric_limits<float>::infinity();
  float upper = -std::numeric_limits<float>::infinity();

  // Once NaN, a bound stays NaN: every comparison with it is false.
  GDFQ_HD void include(float below, float above) {
    lower = (below < lower || below != below) ? below : lower;
    upper = (above > upper || above != above) ? above : upper;
  }
};

namespace {

// The order of comparisons changes nothing, so there are enough lanes to keep the widest vector units busy. These
// comparisons, a single instruction each, pass NaN by, which is looked for besides.
template <class T>
GDFQ_CLONES Range range_of(const T* x, std::int64_t length) {
  constexpr std::int64_t kRangeLanes = 64;
  float lower[kRangeLanes], upper[kRangeLanes];
  std::int32_t is_nan[kRangeLanes];
  Range range;
  for (std::int64_t lane = 0; lane < kRangeLanes; ++lane) {
    lower[lane] = range.lower;
    upper[lane] = range.upper;
    is_nan[lane] = 0;
  }
  const std::int64_t whole = length - length % kRangeLanes;
  for (std::int64_t begin = 0; begin < whole; begin += kRangeLanes) {
    GDFQ_SIMD
    for (std::int64_t lane = 0; lane < kRangeLanes; ++lane) {
      const float value = to_float(x[begin + lane]);
      lower[lane] = value < lower[lane] ? value : lower[lane];
      upper[lane] = value > upper[lane] ? value : upper[lane];
      is_nan[lane] |= value != value;
    }
  }
  for (std::int64_t half = kRangeLanes / 2; half > 0; half /= 2) {
    GDFQ_SIMD
    for (std::int64_t lane = 0; lane < half; ++lane) {
      lower[lane] = lower[lane + half] < lower[lane] ? lower[lane + half] : lower[lane];
      upper[lane] = upper[lane + half] > upper[lane] ? upper[lane + half] : upper[lane];
      is_nan[lane] |= is_nan[lane + half];
    }
  }
  if (is_nan[0]) lower[0] = upper[0] = std::numeric_limits<float>::quiet_NaN();
  range.include(lower[0], upper[0]);
  for (std::int64_t i = whole; i < length; ++i) range.include(to_float(x[i]), to_float(x[i]));
  return range;
}

}  // namespace
}  // namespace gdfq::cpu
