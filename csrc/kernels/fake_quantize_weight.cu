// Quantizers of weights: each output channel between its own minimum and maximum, all layers in one launch.
//
// Bytes per element (float32): 8. A channel is read twice, the second time from the cache.
//
// Launch: `weights.cuh`; more than kLayers layers take more launches.
#include "fake_quantize_weight.h"

#include "weights.cuh"

namespace gdfq::cuda {
namespace {

struct Layer {
  const void* values;
  void* quantized;
  std::int64_t channels;
  std::int64_t length;
  std::int64_t first_block;
  ElementType type;
  int bits;
  Scheme scheme;
  bool aligned;
};

struct Layers {
  Layer at[kLayers];
  int count;
};
static_assert(sizeof(Layers) <= kMaxArguments);

template <int N, class T, class AnyQuantizer>
__device__ void quantize_with(const AnyQuantizer& quantizer, const T* x, T* y, std::int64_t length, Team team) {
#pragma unroll 4
  for (std::int64_t i = team.rank * N; i < length; i += team.size * N) {
    const Vector<T, N> in = load<N>(x + i);
    Vector<T, N> out;
#pragma unroll
    for (int v = 0; v < N; ++v) out.at[v] = from_float<T>(fake_quantize(to_float(in.at[v]), quantizer));
    store(y + i, out);
  }
}

template <class T, int N>
__device__ void quantize_channel(const T* x, T* y, const Layer& layer, Team team) {
  const Extremes range = extremes_of<T, N>(x, layer.length, team);
  if (layer.scheme == Scheme::kEq6) {
    const auto quantizer = Eq6Quantizer::make(range.lower, range.upper, layer.bits);
    quantize_with<N>(make_fast(quantizer), x, y, layer.length, team);
  } else {
    const auto quantizer = StepQuantizer::make(range.lower, range.upper, layer.bits, layer.scheme);
    quantize_with<N>(make_fast(quantizer), x, y, layer.length, team);
  }
}

template <class T>
__device__ void quantize_layer(const Layer& layer, std::int64_t channel, Team team) {
  const T* x = static_cast<const T*>(layer.values) + channel * layer.length;
  T* y = static_cast<T*>(layer.quantized) + channel * layer.length;
  if (layer.aligned) {
    quantize_channel<T, kVector<T>>(x, y, layer, team);
  } else {
    quantize_channel<T, 1>(x, y, layer, team);
  }
}

__global__ void __launch_bounds__(kThreads, 6) weights_kernel(const Layers layers) {
  const std::int64_t block = blockIdx.x;
  const Layer& layer = layers.at[layer_of(layers, block)];
  const auto [team, channel] = place_in(layer, block);
  if (channel >= layer.channels) return;  // of short channels only, a whole warp
  switch (layer.type) {
    case ElementType::kFloat32:
      return quantize_layer<float>(layer, channel, team);
    case ElementType::kFloat16:
      return quantize_layer<Half>(layer, channel, team);
    case ElementType::kBFloat16:
      return quantize_layer<BFloat16>(layer, channel, team);
  }
}

std::int64_t size_of(ElementType type) {
  std::int64_t size = 0;
  with_type(type, [&](auto tag) { size = sizeof(typename decltype(tag)::type); });
  return size;
}

}  // namespace

void fake_quantize_weights(const std::vector<Weight>& weights, const Device& device) {
  Layers layers;
  layers.count = 0;
  std::int64_t blocks = 0;
  const auto launch = [&] {
    if (layers.count == 0) return;
    GDFQ_LAUNCH(weights_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), device.stream, layers);
    layers.count = 0;
    blocks = 0;
  };
  for (const Weight& weight : weights) {
    if (weight.channels == 0 || weight.length == 0) continue;
    const bool aligned =
        is_aligned(weight.values) && is_aligned(weight.quantized) && weight.length * size_of(weight.type) % 16 == 0;
    layers.at[layers.count++] = {weight.values, weight.quantized, weight.channels, weight.length, blocks,
                                 weight.type,   weight.bits,      weight.scheme,   aligned};
    blocks += blocks_for(weight.channels, weight.length);
    if (layers.count == kLayers) launch();
  }
  launch();
  check_launch("fake_quantize_weights");
}

}  // namespace gdfq::cuda
