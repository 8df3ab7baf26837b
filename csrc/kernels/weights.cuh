// Weights by output channel, many layers in one launch: how they are divided among blocks and warps.
//
// The layers' addresses travel as the kernel's argument. A block finds its layer by bisection, and takes one channel
// where channels are long, eight, one to a warp, where they are short: depthwise layers have nine elements in each.
#pragma once

#include "reduce.cuh"
#include "vector.cuh"

namespace gdfq::cuda {

constexpr int kLayers = 64;  // of a launch, at most
constexpr std::int64_t kShort = 1024;

// The threads that share a channel: a warp or the block.
struct Team {
  int rank;
  int size;

  template <class Operation, class T>
  __device__ T reduce(T value) const {
    return size == kWarp ? warp_reduce<Operation>(value) : block_reduce<Operation>(value);
  }
};

// The team of a thread, and its channel of the layer; of short channels there may be fewer than warps.
struct Place {
  Team team;
  std::int64_t channel;
};

template <class Layer>
__device__ Place place_in(const Layer& layer, std::int64_t block) {
  const bool by_warp = layer.length <= kShort;
  const Team team =
      by_warp ? Team{static_cast<int>(threadIdx.x) % kWarp, kWarp} : Team{static_cast<int>(threadIdx.x), kThreads};
  const std::int64_t channel =
      by_warp ? (block - layer.first_block) * (kThreads / kWarp) + threadIdx.x / kWarp : block - layer.first_block;
  return {team, channel};
}

inline std::int64_t blocks_for(std::int64_t channels, std::int64_t length) {
  return length <= kShort ? ceil_divide(channels, kThreads / kWarp) : channels;
}

// Where in the table the layer of a block stands.
template <class Layers>
__device__ int layer_of(const Layers& layers, std::int64_t block) {
  int low = 0;
  for (int high = layers.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    if (block < layers.at[middle].first_block) {
      high = middle;
    } else {
      low = middle;
    }
  }
  return low;
}

// The minimum and the maximum of a channel.
struct Extremes {
  float lower;
  float upper;
};

template <class T, int N>
__device__ Extremes extremes_of(const T* x, std::int64_t length, Team team) {
  float lower = Least::nothing();
  float upper = Greatest::nothing();
#pragma unroll 4
  for (std::int64_t i = team.rank * N; i < length; i += team.size * N) {
    const Vector<T, N> in = load<N>(x + i);
#pragma unroll
    for (int v = 0; v < N; ++v) {
      lower = Least::join(lower, to_float(in.at[v]));
      upper = Greatest::join(upper, to_float(in.at[v]));
    }
  }
  return {team.reduce<Least>(lower), team.reduce<Greatest>(upper)};
}

}  // namespace gdfq::cuda
