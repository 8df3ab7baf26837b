// Half and bfloat16 conversions, over all 2^16 values and around every midpoint between two of them.
#include "kernels/float16.h"

#include "testing.h"

using namespace gdfq;
using namespace gdfq::testing;

namespace {

// The value of a 16-bit float with `mantissa` bits of fraction, by its definition.
double decode(std::uint32_t bits, int mantissa, int bias) {
  const std::uint32_t fraction = bits & ((1u << mantissa) - 1);
  const int exponent = static_cast<int>((bits & 0x7fffu) >> mantissa);
  const int largest = (1 << (15 - mantissa)) - 1;
  const double sign = (bits & 0x8000u) != 0 ? -1.0 : 1.0;
  if (exponent == largest) return fraction != 0 ? std::nan("") : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
  return sign * std::ldexp(fraction + (1u << mantissa), exponent - bias - mantissa);
}

template <class T>
void check_all(int mantissa, int bias) {
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const T value{static_cast<std::uint16_t>(bits)};
    const double expected = decode(bits, mantissa, bias);
    const float converted = to_float(value);
    CHECK(same(converted, static_cast<float>(expected)));
    CHECK(std::isnan(expected) || std::signbit(converted) == std::signbit(expected));
    CHECK(std::isnan(expected) ? std::isnan(to_float(from_float<T>(converted)))
                               : from_float<T>(converted).bits == bits);
  }
}

// The midpoint between neighbours goes to the even one, and its neighbouring floats to the nearer.
template <class T>
void check_rounding(int mantissa, int bias) {
  const std::uint32_t infinity = 0x7fffu & ~((1u << mantissa) - 1);
  for (std::uint32_t below = 0; below + 1 < infinity; ++below) {
    const std::uint32_t above = below + 1;
    const double midpoint = (decode(below, mantissa, bias) + decode(above, mantissa, bias)) / 2;
    const float middle = static_cast<float>(midpoint);
    if (static_cast<double>(middle) != midpoint) continue;
    CHECK(from_float<T>(middle).bits == (below % 2 == 0 ? below : above));
    CHECK(from_float<T>(std::nextafter(middle, 0.0f)).bits == below);
    CHECK(from_float<T>(std::nextafter(middle, kInfinity)).bits == above);
    CHECK(from_float<T>(-middle).bits == (0x8000u | (below % 2 == 0 ? below : above)));
  }
}

}  // namespace

int main() {
  check_all<Half>(10, 15);
  check_all<BFloat16>(7, 127);
  check_rounding<Half>(10, 15);
  check_rounding<BFloat16>(7, 127);
  CHECK(from_float<Half>(65519.0f).bits == 0x7bffu);
  CHECK(from_float<Half>(65520.0f).bits == 0x7c00u);
  CHECK(from_float<Half>(1e10f).bits == 0x7c00u);
  CHECK(from_float<Half>(-kInfinity).bits == 0xfc00u);
  CHECK(from_float<Half>(1e-10f).bits == 0x0000u);
  CHECK(from_float<BFloat16>(3.4e38f).bits == 0x7f80u);
}
