// AdaRound's soft weights with their penalty, and the gradients of both.
//
// Bytes per element: 12 forward, 16 backward.
//
// Launch: `weights.cuh`. A channel has the gradient of its step; of the penalty it leaves its share, and a second
// kernel of a single block adds the shares in double. Nobody waits for the sharpness, which is read on the device.
#include "round_learned.h"

#include "weights.cuh"

namespace gdfq::cuda {
namespace {

struct Layer : SoftWeight {
  std::int64_t first_block;
};

__device__ __forceinline__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

__device__ __forceinline__ float power(float centered, float exponent) {
  return exp2f(exponent * log2f(fabsf(centered)));
}

// Forward, the result is y and each channel's sum its share of the penalty; backward, they are the gradients of v and
// of the step, and only there are there gradients to begin with.
template <bool backward, int N>
__global__ void __launch_bounds__(kThreads)
    round_kernel(const Layer layer, const float* grad_y, const float* grad_penalty, float* result, float* sums) {
  const auto [team, channel] = place_in(layer, blockIdx.x);
  if (channel >= layer.channels) return;  // of short channels only, a whole warp
  const StepQuantizer quantizer = layer.learned.quantizer(channel);
  const float sharpness = *layer.sharpness;
  const float of_penalty = backward ? *grad_penalty * 2.0f * sharpness : 0.0f;
  const std::int64_t offset = channel * layer.length;
  float sum = 0.0f;
  for (std::int64_t i = team.rank * N; i < layer.length; i += team.size * N) {
    const Vector<float, N> base = load<N>(layer.base + offset + i);
    const Vector<float, N> v = load<N>(layer.v + offset + i);
    Vector<float, N> gradient{};
    if constexpr (backward) gradient = load<N>(grad_y + offset + i);
    Vector<float, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const SoftRounding rounding = soft_rounding(sigmoid(v.at[k]));
      if constexpr (backward) {
        const float of_power = power(centered(rounding), sharpness - 1.0f);
        const SoftGradient of = soft_gradient(gradient.at[k], of_penalty, base.at[k], rounding, of_power, quantizer);
        out.at[k] = of.v;
        sum += of.step;
      } else {
        out.at[k] = dequantize(clamp_level(base.at[k] + rounding.up, quantizer), quantizer);
        sum += 1.0f - power(centered(rounding), sharpness);
      }
    }
    store(result + offset + i, out);
  }
  sum = team.reduce<Sum>(sum);
  if (team.rank == 0) sums[channel] = sum;
}

__global__ void __launch_bounds__(kThreads) add_kernel(const float* penalties, std::int64_t channels, float* penalty) {
  double of_thread = 0.0;
  for (std::int64_t c = threadIdx.x; c < channels; c += kThreads) of_thread += penalties[c];
  const double sum = block_reduce<Sum>(of_thread);
  if (threadIdx.x == 0) *penalty = static_cast<float>(sum);
}

template <bool backward>
void run(const SoftWeight& weight, const float* grad_y, const float* grad_penalty, float* result, float* sums,
         const Device& device) {
  constexpr int N = kVector<float>;
  const bool aligned = is_aligned(weight.base) && is_aligned(weight.v) && is_aligned(grad_y) && is_aligned(result) &&
                       weight.length % N == 0;
  const auto kernel = aligned ? round_kernel<backward, N> : round_kernel<backward, 1>;
  const dim3 grid(static_cast<unsigned>(blocks_for(weight.channels, weight.length)));
  GDFQ_LAUNCH(kernel, grid, dim3(kThreads), device.stream, Layer{weight, 0}, grad_y, grad_penalty, result, sums);
}

}  // namespace

void round_learned(const SoftWeight& weight, float* y, float* penalty, const Device& device) {
  float* penalties = nullptr;
  if (weight.channels > 0) {
    penalties = device.scratch(weight.channels);
    run<false>(weight, nullptr, nullptr, y, penalties, device);
  }
  GDFQ_LAUNCH(add_kernel, dim3(1), dim3(kThreads), device.stream, penalties, weight.channels, penalty);
  check_launch("round_learned");
}

void round_learned_backward(const float* grad_y, const float* grad_penalty, const SoftWeight& weight, float* grad_v,
                            float* grad_step, const Device& device) {
  if (weight.channels == 0) return;
  run<true>(weight, grad_y, grad_penalty, grad_v, grad_step, device);
  check_launch("round_learned_backward");
}

}  // namespace gdfq::cuda
