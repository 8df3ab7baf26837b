// Channels in memory, for the kernels whose parameters differ by channel.
//
// A dense tensor is seen as (outer, channels, inner): NCHW has inner = H * W, channels_last has inner = 1. Where inner
// is long, a kernel runs along one channel with its parameters in registers. Where it is short, the parameters are laid
// out once as the pattern in which they meet the elements, and the kernel runs along both. One kernel body serves both:
// it asks for parameter k of the run's element i.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../kernels/channel_shape.h"
#include "../kernels/quantizer.h"
#include "parallel.h"

namespace gdfq::cpu {

inline bool is_interleaved(const ChannelShape& shape) { return shape.channels > 1 && shape.inner < 16; }

// About what stays in the first-level cache. A multiple of 8, so that no two blocks share a byte of a bit mask.
constexpr std::int64_t kBlock = 8192;

// The parameters along a run: the channel's, or those of the pattern's first period.
template <int K>
struct ChannelParameters {
  std::array<float, K> values;
  GDFQ_HD float get(int k, std::int64_t) const { return values[k]; }
};

template <int K>
struct PatternParameters {
  std::array<const float*, K> values;
  std::int64_t length;
  GDFQ_HD float get(int k, std::int64_t i) const { return values[k][i]; }
  std::int64_t period() const { return length; }
};

// K float parameters for every channel, and where the channels are interleaved also their pattern.
template <int K>
class ChannelTable {
 public:
  // make(channel) gives the K parameters of one channel.
  template <class Make>
  ChannelTable(const ChannelShape& shape, const Make& make) : shape_(shape) {
    channels_.reserve(static_cast<std::size_t>(shape.channels));
    for (std::int64_t c = 0; c < shape.channels; ++c) channels_.push_back({make(c)});
    if (is_interleaved(shape)) lay_out_pattern();
  }

  const ChannelShape& shape() const { return shape_; }
  std::int64_t period() const { return period_; }
  const ChannelParameters<K>& channel(std::int64_t c) const { return channels_[static_cast<std::size_t>(c)]; }

  PatternParameters<K> pattern() const {
    PatternParameters<K> parameters;
    parameters.length = period_;
    for (int k = 0; k < K; ++k) parameters.values[k] = pattern_.data() + k * period_;
    return parameters;
  }

 private:
  // Repeated until it is a multiple of 8 elements and long enough for vector loops.
  void lay_out_pattern() {
    const std::int64_t once = shape_.channels * shape_.inner;
    const std::int64_t aligned = std::lcm(once, std::int64_t{8});
    period_ = aligned * std::max<std::int64_t>(1, 256 / aligned);
    pattern_.resize(static_cast<std::size_t>(K * period_));
    for (int k = 0; k < K; ++k) {
      float* const pattern = pattern_.data() + k * period_;
      float* place = pattern;
      for (const ChannelParameters<K>& parameters : channels_) {
        for (std::int64_t i = 0; i < shape_.inner; ++i) *place++ = parameters.values[k];
      }
      for (; place != pattern + period_; place += once) std::copy_n(pattern, once, place);
    }
  }

  ChannelShape shape_;
  std::int64_t period_ = 0;
  std::vector<ChannelParameters<K>> channels_;
  std::vector<float> pattern_;
};

// The block of elements that one thread takes at a time: whole periods where there is a pattern.
template <int K>
std::int64_t block_size(const ChannelTable<K>& table) {
  if (!is_interleaved(table.shape())) return kBlock;
  return table.period() * std::max<std::int64_t>(1, kBlock / table.period());
}

// Calls run(offset, length, parameters) for the runs of the block [begin, end), in order.
template <int K, class Run>
void for_each_run(const ChannelTable<K>& table, std::int64_t begin, std::int64_t end, const Run& run) {
  const ChannelShape& shape = table.shape();
  if (is_interleaved(shape)) {
    const PatternParameters<K> pattern = table.pattern();
    for (std::int64_t offset = begin; offset < end; offset += table.period()) {
      run(offset, std::min(table.period(), end - offset), pattern);
    }
    return;
  }
  std::int64_t channel = begin / shape.inner % shape.channels;
  std::int64_t plane_end = (begin / shape.inner + 1) * shape.inner;
  for (std::int64_t offset = begin; offset < end; plane_end += shape.inner) {
    const std::int64_t stop = std::min(end, plane_end);
    run(offset, stop - offset, table.channel(channel));
    offset = stop;
    if (++channel == shape.channels) channel = 0;
  }
}

// Calls run(offset, length, parameters) for runs that cover the tensor, on all threads.
template <int K, class Run>
void for_each_run(const ChannelTable<K>& table, const Parallel& parallel, const Run& run) {
  const std::int64_t numel = table.shape().numel();
  const std::int64_t block = block_size(table);
  parallel_for(parallel, (numel + block - 1) / block, [&](std::int64_t first, std::int64_t last) {
    for_each_run(table, first * block, std::min(last * block, numel), run);
  });
}

}  // namespace gdfq::cpu
