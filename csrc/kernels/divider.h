// Division by a number that is the same for a whole launch: a multiplication and a shift, where the hardware's own
// takes some twenty instructions (Granlund and Montgomery, 1994).
#pragma once

#include <cstdint>

#include "quantizer.h"

namespace gdfq {

// For dividends and divisors below 2^31.
struct Divider {
  std::uint32_t divisor;
  std::uint32_t multiplier;
  std::uint32_t shift = 0;

  explicit Divider(std::int64_t d) : divisor(static_cast<std::uint32_t>(d)) {
    while ((std::int64_t{1} << shift) < d) ++shift;
    const auto excess = static_cast<std::uint64_t>((std::int64_t{1} << shift) - d);
    multiplier = static_cast<std::uint32_t>((excess << 32) / static_cast<std::uint64_t>(d) + 1);
  }

  GDFQ_HD std::uint32_t quotient(std::uint32_t n) const {
    const auto high = static_cast<std::uint32_t>((static_cast<std::uint64_t>(n) * multiplier) >> 32);
    return (high + n) >> shift;
  }
};

}  // namespace gdfq
