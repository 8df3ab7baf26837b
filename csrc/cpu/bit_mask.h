// One bit per element: bit i % 8 of byte i / 8 belongs to element i. Loops work on one byte per element, which
// vectorizes; eight of those bytes become one, and back, with a single multiplication.
#pragma once

#include <cstdint>
#include <cstring>

#include "../kernels/quantizer.h"

namespace gdfq::cpu {

// Eight bytes, each 0 or 1, to one byte. The products land in distinct bits of the top byte, without carries.
GDFQ_HD std::uint8_t pack_eight(const std::uint8_t* flags) {
  std::uint64_t bytes = 0;
  for (int i = 0; i < 8; ++i) bytes |= static_cast<std::uint64_t>(flags[i]) << (8 * i);
  return static_cast<std::uint8_t>((bytes * 0x0102040810204080u) >> 56);
}

// Bits past the last element are 0.
inline void pack_bits(const std::uint8_t* flags, std::int64_t count, std::uint8_t* mask) {
  const std::int64_t whole = count / 8;
  for (std::int64_t i = 0; i < whole; ++i) mask[i] = pack_eight(flags + 8 * i);
  if (count % 8 == 0) return;
  std::uint8_t rest[8] = {};
  memcpy(rest, flags + 8 * whole, static_cast<std::size_t>(count % 8));
  mask[whole] = pack_eight(rest);
}

// The last whole byte is unpacked as well: flags holds count rounded up to a multiple of 8.
GDFQ_HD void unpack_bits(const std::uint8_t* mask, std::int64_t count, std::uint8_t* flags) {
  for (std::int64_t i = 0; i < (count + 7) / 8; ++i) {
    // Each copy of the byte keeps one of its bits; the addition carries any nonzero byte into its own top bit.
    const std::uint64_t kept = (mask[i] * 0x0101010101010101u) & 0x8040201008040201u;
    const std::uint64_t bytes = ((kept + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
    for (int j = 0; j < 8; ++j) flags[8 * i + j] = static_cast<std::uint8_t>(bytes >> (8 * j));
  }
}

}  // namespace gdfq::cpu
