// Two sums over each channel, in two stages with no atomics: blocks that the tensor's shape alone decides leave partial
// sums, which are then added in order, in double. (Both reductions over channels that training needs come in pairs: the
// moments, and the gradients of a BN's weight and bias.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "channels.h"
#include "lanes.h"

namespace gdfq::cpu {

struct ChannelSums {
  explicit ChannelSums(std::int64_t channels)
      : first(static_cast<std::size_t>(channels)), second(static_cast<std::size_t>(channels)) {}
  std::vector<double> first;
  std::vector<double> second;
};

// Where a run adds its two sums: at one place along one channel, else element i at place i % period.
struct Accumulators {
  float* first;
  float* second;
};

// Calls strip(begin, length, sums) for the strips of a run; element begin + i is added to sums.first[i] and .second[i].
template <int K, class Strip>
GDFQ_HD void for_each_strip(std::int64_t length, const PatternParameters<K>& parameters, Accumulators accumulators,
                            const Strip& strip) {
  const std::int64_t period = parameters.period();
  for (std::int64_t begin = 0; begin < length; begin += period) {
    strip(begin, std::min(period, length - begin), accumulators);
  }
}

// Along one channel the sums stay in registers, which takes local arrays and strips of constant length. The rest has
// arrays of its own: a vector read of lanes just written one by one would stall.
template <int K, class Strip>
GDFQ_HD void for_each_strip(std::int64_t length, const ChannelParameters<K>&, Accumulators accumulators,
                            const Strip& strip) {
  float first[kLanes] = {};
  float second[kLanes] = {};
  const std::int64_t rest = length % kLanes;
  const std::int64_t whole = length - rest;
  for (std::int64_t begin = 0; begin < whole; begin += kLanes) strip(begin, kLanes, Accumulators{first, second});
  float first_sum = add_lanes(first);
  float second_sum = add_lanes(second);
  if (rest > 0) {
    float first_rest[kLanes] = {};
    float second_rest[kLanes] = {};
    strip(whole, rest, Accumulators{first_rest, second_rest});
    for (std::int64_t lane = 0; lane < rest; ++lane) {
      first_sum += first_rest[lane];
      second_sum += second_rest[lane];
    }
  }
  *accumulators.first += first_sum;
  *accumulators.second += second_sum;
}

namespace detail {

struct Partial {
  float first = 0.0f;
  float second = 0.0f;
};

// Adds the segments' sums to their channels, in order.
inline ChannelSums add_segments(const std::vector<Partial>& partial, const ChannelShape& shape, std::int64_t pieces) {
  ChannelSums sums(shape.channels);
  auto next = partial.begin();
  for (std::int64_t outer = 0; outer < shape.outer; ++outer) {
    for (std::size_t channel = 0; channel < sums.first.size(); ++channel) {
      for (std::int64_t piece = 0; piece < pieces; ++piece, ++next) {
        sums.first[channel] += next->first;
        sums.second[channel] += next->second;
      }
    }
  }
  return sums;
}

// One partial sum per segment: a piece of at most kBlock elements of one channel's plane.
template <int K, class Run>
ChannelSums sum_planes(const ChannelTable<K>& table, const Parallel& parallel, const Run& run) {
  const ChannelShape& shape = table.shape();
  const std::int64_t pieces = (shape.inner + kBlock - 1) / kBlock;
  const std::int64_t segments = shape.outer * shape.channels * pieces;
  const std::int64_t together = std::max<std::int64_t>(1, kBlock / shape.inner);
  std::vector<Partial> partial(static_cast<std::size_t>(segments));
  parallel_for(parallel, (segments + together - 1) / together, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t stop = std::min(end * together, segments);
    std::int64_t segment = begin * together;
    std::int64_t plane = segment / pieces, piece = segment % pieces, channel = plane % shape.channels;
    for (; segment < stop; ++segment) {
      Partial& sums = partial[static_cast<std::size_t>(segment)];
      const std::int64_t skipped = piece * kBlock;
      run(plane * shape.inner + skipped, std::min(kBlock, shape.inner - skipped), table.channel(channel),
          Accumulators{&sums.first, &sums.second});
      // Counting on, because for a 7x7 plane the divisions would cost as much as the sums.
      if (++piece < pieces) continue;
      piece = 0;
      ++plane;
      if (++channel == shape.channels) channel = 0;
    }
  });
  return add_segments(partial, shape, pieces);
}

// Adds up all blocks' partial sums at each place of the pattern, then the places of each channel.
inline void add_blocks(const std::vector<float>& partial, std::int64_t period, const ChannelShape& shape,
                       std::vector<double>& sums) {
  std::vector<double> places(static_cast<std::size_t>(period));
  for (std::size_t begin = 0; begin < partial.size(); begin += places.size()) {
    for (std::size_t i = 0; i < places.size(); ++i) places[i] += partial[begin + i];
  }
  for (auto place = places.begin(); place != places.end();) {
    for (double& sum : sums) {
      for (std::int64_t i = 0; i < shape.inner; ++i) sum += *place++;
    }
  }
}

// One partial sum per block and place in the pattern. The number of blocks is bounded, so the partial sums stay small.
template <int K, class Run>
ChannelSums sum_pattern(const ChannelTable<K>& table, const Parallel& parallel, const Run& run) {
  const std::int64_t numel = table.shape().numel();
  const std::int64_t period = table.period();
  constexpr std::int64_t kMaxBlocks = 128;
  const std::int64_t periods = (numel + period - 1) / period;
  const std::int64_t block = period * std::max(block_size(table) / period, (periods + kMaxBlocks - 1) / kMaxBlocks);
  const std::int64_t blocks = (numel + block - 1) / block;
  std::vector<float> first(static_cast<std::size_t>(blocks * period));
  std::vector<float> second(first.size());
  parallel_for(parallel, blocks, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      run(b * block, std::min(block, numel - b * block), table.pattern(),
          Accumulators{first.data() + b * period, second.data() + b * period});
    }
  });
  ChannelSums sums(table.shape().channels);
  add_blocks(first, period, table.shape(), sums.first);
  add_blocks(second, period, table.shape(), sums.second);
  return sums;
}

}  // namespace detail

// Calls run(offset, length, parameters, accumulators) for runs that cover the tensor, on all threads.
template <int K, class Run>
ChannelSums sum_channels(const ChannelTable<K>& table, const Parallel& parallel, const Run& run) {
  if (is_interleaved(table.shape())) return detail::sum_pattern(table, parallel, run);
  return detail::sum_planes(table, parallel, run);
}

}  // namespace gdfq::cpu
