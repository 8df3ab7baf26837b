// float16 and bfloat16 as stored, and their conversions to and from float32 (round to nearest even, NaN stays NaN).
// On the host integer arithmetic and selects only: the loops that use them vectorize on every instruction set, and a
// flush-denormals mode changes nothing. The device has instructions for it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "quantizer.h"

namespace gdfq {

struct Half {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

GDFQ_HD std::uint32_t float_bits(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

GDFQ_HD float bits_float(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

GDFQ_HD float to_float(float value) { return value; }

GDFQ_HD float to_float(BFloat16 value) { return bits_float(static_cast<std::uint32_t>(value.bits) << 16); }

GDFQ_HD float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = (value.bits & 0x7fffu);
  const std::uint32_t shifted = magnitude << 13;
  const std::uint32_t normal = shifted + (112u << 23);
  const std::uint32_t infinite_or_nan = shifted + (224u << 23);
  // A subnormal is magnitude * 2^-24: written as the low bits of a float that starts at 2^-14, less that 2^-14.
  const std::uint32_t subnormal = float_bits(bits_float(shifted + (113u << 23)) - bits_float(113u << 23));
  std::uint32_t bits = magnitude < 0x0400u ? subnormal : normal;
  bits = magnitude >= 0x7c00u ? infinite_or_nan : bits;
  return bits_float(bits | sign);
#endif
}

template <class T>
GDFQ_HD T from_float(float value);

template <>
GDFQ_HD float from_float<float>(float value) {
  return value;
}

template <>
GDFQ_HD BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet_nan = (bits >> 16) | 0x0040u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{static_cast<std::uint16_t>(is_nan ? quiet_nan : rounded)};
#endif
}

template <>
GDFQ_HD Half from_float<Half>(float value) {
#if defined(__CUDA_ARCH__)
  return Half{__half_as_ushort(__float2half_rn(value))};
#else
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // From 65520 up the carry of the rounding makes infinity by itself; from 65536 up the exponent no longer fits.
  const std::uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const std::uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // The unit in the last place of 0.5 is 2^-24, that of a subnormal half: the addition rounds.
  const std::uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? overflow : half;
  return Half{static_cast<std::uint16_t>(half | sign)};
#endif
}

}  // namespace gdfq
