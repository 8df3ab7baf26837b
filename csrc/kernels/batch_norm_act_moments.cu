// y = act(x * scale_c + shift_c), and the mean and the biased variance of x in each channel, from one read of x.
// The gradient of both joins the gradient of y in one pass.
//
// Bytes per element (float32): 8 forward, 12 backward.
//
// Launch: `channels.cuh`. The forward sums d and d^2 with d = x - running_mean: deviations from a point near the mean
// keep the variance accurate where sums of x and x^2 would cancel. One warp for each channel finishes them.
#include "batch_norm_act_moments.h"

#include "channels.cuh"

namespace gdfq::cuda {
namespace {

template <class T>
struct Forward : ChannelOperation<T, 1, 2, true> {
  FrozenBatchNorm norm;
  Bounds activation;

  struct Group {
    Affine affine;
    float mean;
  };

  __device__ Group group(std::int64_t c) const { return {norm.affine(c), norm.running_mean[c]}; }

  __device__ float operator()(const float (&in)[1], const Group& group, float (&sums)[2]) const {
    const float deviation = in[0] - group.mean;
    sums[0] += deviation;
    sums[1] += deviation * deviation;
    return activate(apply_affine(in[0], group.affine), activation);
  }
};

__global__ void __launch_bounds__(kThreads)
    finish_kernel(Partial partial, const float* running_mean, double count, float* mean, float* variance) {
  const std::int64_t c = group_of_warp();
  if (c >= partial.groups) return;
  const double deviation = sum_of_shares(partial, 0, c) / count;
  const double square = sum_of_shares(partial, 1, c) / count - deviation * deviation;
  if (threadIdx.x % kWarp != 0) return;
  mean[c] = static_cast<float>(running_mean[c] + deviation);
  variance[c] = static_cast<float>(square < 0.0 ? 0.0 : square);
}

template <class T>
struct Backward : ChannelOperation<T, 2, 0, true> {
  FrozenBatchNorm norm;
  Bounds activation;
  const float* mean;
  const float* grad_mean;
  const float* grad_variance;
  float count;

  struct Group {
    Affine affine;
    float mean;
    float grad_mean;      // divided by n
    float grad_variance;  // times 2 / n
  };

  __device__ Group group(std::int64_t c) const {
    return {norm.affine(c), mean[c], grad_mean[c] / count, grad_variance[c] * 2.0f / count};
  }

  __device__ float operator()(const float (&in)[2], const Group& group, float (&)[1]) const {
    const float grad_z = is_active(apply_affine(in[1], group.affine), activation) ? in[0] : 0.0f;
    return grad_z * group.affine.scale + (group.grad_mean + group.grad_variance * (in[1] - group.mean));
  }
};

}  // namespace

void batch_norm_act_moments(const void* x, void* y, float* mean, float* variance, ElementType type, ChannelShape shape,
                            const FrozenBatchNorm& norm, Activation activation, const Device& device) {
  if (shape.channels == 0) return;
  const auto set = [&](auto& operation) {
    operation.norm = norm;
    operation.activation = bounds_of(activation);
  };
  const Partial partial = for_each_channel<Forward>(type, {x}, y, GroupedShape(shape), device, set);
  const double count = static_cast<double>(shape.outer * shape.inner);
  GDFQ_LAUNCH(finish_kernel, grid_of_warps(shape.channels), dim3(kThreads), device.stream, partial, norm.running_mean,
              shape.numel() == 0 ? 0.0 : count, mean, variance);
  check_launch("batch_norm_act_moments");
}

void batch_norm_act_moments_backward(const void* grad_y, const float* grad_mean, const float* grad_variance,
                                     const void* x, const float* mean, void* grad_x, ElementType type,
                                     ChannelShape shape, const FrozenBatchNorm& norm, Activation activation,
                                     const Device& device) {
  for_each_channel<Backward>(type, {grad_y, x}, grad_x, GroupedShape(shape), device, [&](auto& operation) {
    operation.norm = norm;
    operation.activation = bounds_of(activation);
    operation.mean = mean;
    operation.grad_mean = grad_mean;
    operation.grad_variance = grad_variance;
    operation.count = static_cast<float>(shape.outer * shape.inner);
  });
  check_launch("batch_norm_act_moments_backward");
}

}  // namespace gdfq::cuda
