// One bit per element: bit i % 8 of byte i / 8 belongs to element i. Loops work on one byte per element, which
// vectorizes; eight of those bytes become one, and back, with a single multiplication.
#pragma once

#include <cstdint>
#include <cstring>

#include "../kernels/quantizer.h"

namespace gdfq::cpu {

// Eight flags as one word, the first in its lowest byte whatever the machine's byte order.
GDFQ_HD std::uint64_t load_flags(const std::uint8_t* flags) {
  std::uint64_t word;
  memcpy(&word, flags, sizeof(word));
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return word;
}

GDFQ_HD void store_flags(std::uint64_t word, std::uint8_t* flags) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  memcpy(flags, &word, sizeof(word));
}

// Packs flags of 0 and 1. The products land in distinct bits of the top byte, without carries; bits past the last
// element are 0.
inline void pack_bits(const std::uint8_t* flags, std::int64_t count, std::uint8_t* mask) {
  constexpr std::uint64_t kGather = 0x0102040810204080u;
  const std::int64_t whole = count / 8;
  for (std::int64_t i = 0; i < whole; ++i) {
    mask[i] = static_cast<std::uint8_t>((load_flags(flags + 8 * i) * kGather) >> 56);
  }
  if (count % 8 == 0) return;
  std::uint8_t rest[8] = {};
  memcpy(rest, flags + 8 * whole, static_cast<std::size_t>(count % 8));
  mask[whole] = static_cast<std::uint8_t>((load_flags(rest) * kGather) >> 56);
}

// The last byte is unpacked whole: flags holds count rounded up to a multiple of 8.
inline void unpack_bits(const std::uint8_t* mask, std::int64_t count, std::uint8_t* flags) {
  for (std::int64_t i = 0; i < (count + 7) / 8; ++i) {
    // Each copy of the byte keeps one of its bits; the addition carries any nonzero byte into its own top bit.
    const std::uint64_t kept = (mask[i] * 0x0101010101010101u) & 0x8040201008040201u;
    store_flags(((kept + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u, flags + 8 * i);
  }
}

}  // namespace gdfq::cpu
