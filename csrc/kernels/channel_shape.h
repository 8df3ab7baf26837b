// A dense tensor seen as (outer, channels, inner): NCHW has inner = H * W, channels_last has inner = 1.
#pragma once

#include <cstdint>

namespace gdfq {

struct ChannelShape {
  std::int64_t outer;
  std::int64_t channels;
  std::int64_t inner;

  // With a single channel the whole tensor is one run.
  static ChannelShape of(std::int64_t numel, std::int64_t channels, std::int64_t inner) {
    if (channels == 1) return {1, 1, numel};
    return {numel == 0 ? 0 : numel / (channels * inner), channels, inner};
  }

  std::int64_t numel() const { return outer * channels * inner; }
};

}  // namespace gdfq
