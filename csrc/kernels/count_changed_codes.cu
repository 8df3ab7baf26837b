// How many codes of a weight change in steps of several sizes, for AIT's choice of one (CVPR 2022): each output channel
// keeps the range that it has before the step.
//
// Bytes per element: 8. A channel is read twice, the second time from the cache.
//
// Launch: `weights.cuh`. A channel leaves its counts, and a second kernel of one block for each layer adds them, a warp
// for each size of the step. Nobody waits for the learning rate, which is read on the device.
#include "count_changed_codes.h"

#include "weights.cuh"

namespace gdfq::cuda {
namespace {

struct Layer {
  const float* weight;
  const float* direction;
  std::int64_t channels;
  std::int64_t length;
  std::int64_t first_block;
  std::int64_t first_channel;  // among those of the launch
  int bits;
  Scheme scheme;
  bool aligned;
};

struct Layers {
  Layer at[kLayers];
  int count;
};
static_assert(sizeof(Layers) <= kMaxArguments - 64);  // besides the others

template <int N, class AnyQuantizer>
__device__ void count_with(const AnyQuantizer& quantizer, const float* weight, const float* direction,
                           std::int64_t length, Team team, const float* sizes, int count, std::uint32_t* of_channel) {
  std::uint32_t changed[kMostKappas] = {};
  for (std::int64_t i = team.rank * N; i < length; i += team.size * N) {
    const Vector<float, N> from = load<N>(weight + i);
    const Vector<float, N> along = load<N>(direction + i);
    float codes[N];
#pragma unroll
    for (int v = 0; v < N; ++v) codes[v] = code_of(from.at[v], quantizer);
#pragma unroll
    for (int k = 0; k < kMostKappas; ++k) {
      if (k >= count) break;
      const float size = sizes[k];
#pragma unroll
      for (int v = 0; v < N; ++v) {
        if (code_of(step(from.at[v], size, along.at[v]), quantizer) != codes[v]) ++changed[k];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kMostKappas; ++k) {
    if (k >= count) return;
    const std::uint32_t sum = team.reduce<Sum>(changed[k]);
    if (team.rank == 0) of_channel[k] = sum;
  }
}

template <int N>
__device__ void count_channel(const Layer& layer, std::int64_t channel, Team team, const float* sizes, int count,
                              std::uint32_t* of_channel) {
  const float* weight = layer.weight + channel * layer.length;
  const float* direction = layer.direction + channel * layer.length;
  const Extremes range = extremes_of<float, N>(weight, layer.length, team);
  if (layer.scheme == Scheme::kEq6) {
    const auto quantizer = Eq6Quantizer::make(range.lower, range.upper, layer.bits);
    count_with<N>(quantizer, weight, direction, layer.length, team, sizes, count, of_channel);
  } else {
    const auto quantizer = StepQuantizer::make(range.lower, range.upper, layer.bits, layer.scheme);
    count_with<N>(make_fast(quantizer), weight, direction, layer.length, team, sizes, count, of_channel);
  }
}

__global__ void __launch_bounds__(kThreads)
    changed_weights_kernel(const Layers layers, const float* learning_rate, const float* kappas, int count,
                           std::uint32_t* of_channels) {
  __shared__ float sizes[kMostKappas];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < count) sizes[thread] = fp32::multiply(kappas[thread], *learning_rate);
  __syncthreads();
  const std::int64_t block = blockIdx.x;
  const Layer& layer = layers.at[layer_of(layers, block)];
  const auto [team, channel] = place_in(layer, block);
  if (channel >= layer.channels) return;  // of short channels only, a whole warp
  std::uint32_t* of_channel = of_channels + (layer.first_channel + channel) * count;
  if (layer.aligned) {
    count_channel<4>(layer, channel, team, sizes, count, of_channel);
  } else {
    count_channel<1>(layer, channel, team, sizes, count, of_channel);
  }
}

__global__ void __launch_bounds__(kThreads)
    add_kernel(const Layers layers, const std::uint32_t* of_channels, int count, std::int64_t* counts) {
  const Layer& layer = layers.at[blockIdx.x];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int k = static_cast<int>(threadIdx.x) / kWarp; k < count; k += kThreads / kWarp) {
    std::int64_t sum = 0;
    for (std::int64_t c = lane; c < layer.channels; c += kWarp) {
      sum += of_channels[(layer.first_channel + c) * count + k];
    }
    sum = warp_reduce<Sum>(sum);
    if (lane == 0) counts[static_cast<std::int64_t>(blockIdx.x) * count + k] = sum;
  }
}

}  // namespace

void count_changed_codes(const std::vector<WeightStep>& weights, const float* learning_rate, const float* kappas,
                         int count, std::int64_t* counts, const Device& device) {
  Layers layers;
  layers.count = 0;
  std::int64_t blocks = 0;
  std::int64_t channels = 0;
  const auto launch = [&] {
    auto* of_channels = reinterpret_cast<std::uint32_t*>(device.scratch(channels * count));
    if (blocks > 0) {
      GDFQ_LAUNCH(changed_weights_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), device.stream, layers,
                  learning_rate, kappas, count, of_channels);
    }
    GDFQ_LAUNCH(add_kernel, dim3(static_cast<unsigned>(layers.count)), dim3(kThreads), device.stream, layers,
                of_channels, count, counts);
    counts += std::int64_t{layers.count} * count;
    layers.count = 0;
    blocks = 0;
    channels = 0;
  };
  for (const WeightStep& weight : weights) {
    const std::int64_t of_weight = weight.length == 0 ? 0 : weight.channels;
    const bool aligned = is_aligned(weight.weight) && is_aligned(weight.direction) && weight.length % 4 == 0;
    layers.at[layers.count++] = {weight.weight, weight.direction, of_weight,     weight.length, blocks,
                                 channels,      weight.bits,      weight.scheme, aligned};
    blocks += blocks_for(of_weight, weight.length);
    channels += of_weight;
    if (layers.count == kLayers) launch();
  }
  if (layers.count > 0) launch();
  check_launch("count_changed_codes");
}

}  // namespace gdfq::cuda
