// exp and log in plain arithmetic, which vectorizes where a call of the library's does not.
#pragma once

#include "../kernels/float16.h"

namespace gdfq::cpu {

// Of numbers that are not positive, to about a unit in the last place; 0 where it is below the normal numbers. NaN
// stays NaN.
//   x = n ln 2 + r, |r| <= ln 2 / 2        exp(x) = 2^n (1 + r + r^2 / 2! + ... + r^7 / 7!)
GDFQ_HD float exp_of_negative(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: added, it rounds to a whole number and leaves it in the low bits
  const float shifted = x * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts: n times the first is exact
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 1.0f / 2;
  sum = sum * r * r + r + 1.0f;
  const float power = bits_float((float_bits(shifted) << 23) + float_bits(1.0f));
  return x < -87.0f ? 0.0f : sum * power;
}

// Of numbers from 0 to 1, to about a unit in the last place; of 0 a number below -87, the exponential of which is 0.
// NaN stays NaN.
//   x = 2^n (1 + f), sqrt(1/2) <= 1 + f < sqrt(2)        log(x) = n ln 2 + f - f^2 / 2 + f^3 p(f)
GDFQ_HD float log_of_share(float x) {
  constexpr float kRootOfHalf = 0.707106781f;
  const auto n = static_cast<std::int32_t>(float_bits(x) - float_bits(kRootOfHalf)) >> 23;
  const float f = x * bits_float(static_cast<std::uint32_t>(127 - n) << 23) - 1.0f;
  float sum = 7.0376836e-2f;  // p is that of Cephes' logf
  sum = sum * f - 1.1514610e-1f;
  sum = sum * f + 1.1676999e-1f;
  sum = sum * f - 1.2420141e-1f;
  sum = sum * f + 1.4249323e-1f;
  sum = sum * f - 1.6668058e-1f;
  sum = sum * f + 2.0000715e-1f;
  sum = sum * f - 2.4999994e-1f;
  sum = sum * f + 3.3333331e-1f;
  const auto whole = static_cast<float>(n);
  const float rest = sum * f * f * f + whole * -2.12194440e-4f - 0.5f * f * f;
  return whole * 0.693359375f + (f + rest);
}

}  // namespace gdfq::cpu
