// y = quantize(act(x * scale_c + shift_c)), with the gradients of x and of the BN's weight and bias in one pass.
//
// Bytes per element (float32): 8 forward, 12 backward. Nothing is saved for the backward but x, which the convolution
// before it has anyway: z and the level are computed again, which costs less than reading a mask.
//
// Launch: `channels.cuh`. The backward's two sums per channel are finished by one warp for each channel.
#include "batch_norm_act_fake_quantize.h"

#include "channels.cuh"

namespace gdfq::cuda {
namespace {

template <class T, class Quantizer>
struct Forward : ChannelOperation<T, 1, 0, true> {
  FrozenBatchNorm norm;
  Bounds activation;
  Ranges ranges;
  Fast<Quantizer> quantizer;

  using Group = Affine;

  __device__ void prepare() { quantizer = make_fast(ranges.quantizer<Quantizer>()); }
  __device__ Group group(std::int64_t c) const { return norm.affine(c); }

  __device__ float operator()(const float (&in)[1], const Group& affine, float (&)[1]) const {
    return fake_quantize(activate(apply_affine(in[0], affine), activation), quantizer);
  }
};

// Sums dz * (x - running_mean) and dz, where dz is the gradient of z.
template <class T, class Quantizer>
struct Backward : ChannelOperation<T, 2, 2, true> {
  FrozenBatchNorm norm;
  Bounds activation;
  Ranges ranges;
  bool clipped;
  FastAtLevels<Quantizer> quantizer;

  struct Group {
    Affine affine;
    float mean;
  };

  __device__ void prepare() { quantizer = make_fast_at_levels(ranges.quantizer<Quantizer>()); }
  __device__ Group group(std::int64_t c) const { return {norm.affine(c), norm.running_mean[c]}; }

  __device__ float operator()(const float (&in)[2], const Group& group, float (&sums)[2]) const {
    const float x = in[1];
    const float z = apply_affine(x, group.affine);
    bool passes = is_active(z, activation);
    if (clipped) passes = passes && is_inside(round_to_level(activate(z, activation), quantizer), quantizer);
    const float grad_z = passes ? in[0] : 0.0f;
    sums[0] += grad_z * (x - group.mean);
    sums[1] += grad_z;
    return fp32::multiply(grad_z, group.affine.scale);
  }
};

template <class Quantizer>
struct With {
  template <class T>
  using Forward = cuda::Forward<T, Quantizer>;
  template <class T>
  using Backward = cuda::Backward<T, Quantizer>;
};

__global__ void __launch_bounds__(kThreads)
    finish_kernel(Partial partial, FrozenBatchNorm norm, float* grad_weight, float* grad_bias) {
  const std::int64_t c = group_of_warp();
  if (c >= partial.groups) return;
  const double weight = sum_of_shares(partial, 0, c);
  const double bias = sum_of_shares(partial, 1, c);
  if (threadIdx.x % kWarp != 0) return;
  grad_weight[c] = static_cast<float>(weight * inverse_std(norm.running_var[c], norm.epsilon));
  grad_bias[c] = static_cast<float>(bias);
}

}  // namespace

void batch_norm_act_fake_quantize(const void* x, void* y, ElementType type, ChannelShape shape,
                                  const FrozenBatchNorm& norm, const Ranges& ranges, Activation activation,
                                  const Device& device) {
  with_quantizer(ranges.scheme, [&](auto scheme) {
    using Operation = With<decltype(scheme)>;
    for_each_channel<Operation::template Forward>(type, {x}, y, GroupedShape(shape), device, [&](auto& operation) {
      operation.norm = norm;
      operation.activation = bounds_of(activation);
      operation.ranges = ranges;
    });
  });
  check_launch("batch_norm_act_fake_quantize");
}

void batch_norm_act_fake_quantize_backward(const void* grad_y, const void* x, void* grad_x, float* grad_weight,
                                           float* grad_bias, ElementType type, ChannelShape shape,
                                           const FrozenBatchNorm& norm, const Ranges& ranges, Activation activation,
                                           bool clipped, const Device& device) {
  if (shape.channels == 0) return;
  const auto set = [&](auto& operation) {
    operation.norm = norm;
    operation.activation = bounds_of(activation);
    operation.ranges = ranges;
    operation.clipped = clipped;
  };
  Partial partial{};
  with_quantizer(ranges.scheme, [&](auto scheme) {
    using Operation = With<decltype(scheme)>;
    partial =
        for_each_channel<Operation::template Backward>(type, {grad_y, x}, grad_x, GroupedShape(shape), device, set);
  });
  GDFQ_LAUNCH(finish_kernel, grid_of_warps(shape.channels), dim3(kThreads), device.stream, partial, norm, grad_weight,
              grad_bias);
  check_launch("batch_norm_act_fake_quantize_backward");
}

}  // namespace gdfq::cuda
