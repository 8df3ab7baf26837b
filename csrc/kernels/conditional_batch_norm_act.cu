// The generator's batch normalization, with statistics of the batch, gamma and beta chosen by each sample's label, and
// LeakyReLU:
//   xhat = (x - mean_c) / sqrt(var_c + epsilon)        y = leaky(weight[label_n, c] * xhat + bias[label_n, c])
//
// Bytes per element (float32): 12 forward (the statistics need a pass of their own), 20 backward (the sums over a
// channel do, too).
//
// Launch: `channels.cuh`, for the statistics with channels as groups, otherwise with (sample, channel) as groups, since
// that is what shares a gamma and a beta. Between the passes, small kernels finish the sums: one warp for each channel,
// and for the gradients of the tables one thread for each channel of a sample. The first sample of a label adds those
// of all later samples with it: no atomics, and nothing but clearing the tables grows with the number of classes.
#include "conditional_batch_norm_act.h"

#include "channels.cuh"

namespace gdfq::cuda {
namespace {

GroupedShape by_sample(const ChannelShape& shape, std::int64_t samples) {
  return {samples, shape.outer / samples, shape.channels, shape.inner};
}

template <class T>
struct Moments : ChannelOperation<T, 1, 2, false> {
  const float* running_mean;

  using Group = float;
  __device__ Group group(std::int64_t c) const { return running_mean[c]; }

  __device__ float operator()(const float (&in)[1], const Group& center, float (&sums)[2]) const {
    const float deviation = in[0] - center;
    sums[0] += deviation;
    sums[1] += deviation * deviation;
    return 0.0f;
  }
};

__global__ void __launch_bounds__(kThreads)
    statistics_kernel(Partial partial, double count, float momentum, float epsilon, BatchStatistics statistics) {
  const std::int64_t c = group_of_warp();
  if (c >= partial.groups) return;
  const double sum = sum_of_shares(partial, 0, c);
  const double sum_of_squares = sum_of_shares(partial, 1, c);
  if (threadIdx.x % kWarp != 0) return;
  statistics.set(c, statistics.running_mean[c], sum, sum_of_squares, count, momentum, epsilon);
}

// The parameters of group sample * channels + c.
struct Groups {
  ConditionalBatchNorm norm;
  const float* mean;
  const float* inv_std;

  __device__ Normalization at(std::int64_t group) const {
    const std::int64_t sample = group / norm.channels;
    return norm.at(sample, group - sample * norm.channels, mean, inv_std);
  }
};

template <class T>
struct Forward : ChannelOperation<T, 1, 0, true> {
  Groups groups;

  using Group = Normalization;
  __device__ Group group(std::int64_t g) const { return groups.at(g); }

  __device__ float operator()(const float (&in)[1], const Group& group, float (&)[1]) const {
    return leaky_relu(group.affine(in[0]), groups.norm.slope);
  }
};

// Sums dz * xhat and dz over each channel of each sample.
template <class T>
struct Sums : ChannelOperation<T, 2, 2, false> {
  Groups groups;

  using Group = Normalization;
  __device__ Group group(std::int64_t g) const { return groups.at(g); }

  __device__ float operator()(const float (&in)[2], const Group& group, float (&sums)[2]) const {
    const float grad_z = through_leaky_relu(in[0], group.affine(in[1]), groups.norm.slope);
    sums[0] += grad_z * group.normalized(in[1]);
    sums[1] += grad_z;
    return 0.0f;
  }
};

// A group's two sums over all shares, where the second stage leaves them: [sum][sample * channels + c].
__global__ void __launch_bounds__(kThreads) join_shares_kernel(Partial partial, float* sums) {
  const std::int64_t group = group_of_warp();
  if (group >= partial.groups) return;
  for (int k = 0; k < 2; ++k) {
    const double sum = sum_of_shares(partial, k, group);
    if (threadIdx.x % kWarp == 0) sums[k * partial.groups + group] = static_cast<float>(sum);
  }
}

// Sums over the samples of a channel, weighted by gamma: what the gradient of x takes from mean and variance.
// A sample without a row makes it NaN.
__global__ void __launch_bounds__(kThreads) channel_kernel(const float* sums, Groups groups, float* of_channel) {
  const std::int64_t c = group_of_warp();
  const std::int64_t channels = groups.norm.channels;
  if (c >= channels) return;
  float weighted[2] = {0.0f, 0.0f};
  for (std::int64_t n = threadIdx.x % kWarp; n < groups.norm.samples; n += kWarp) {
    const float gamma = groups.norm.gamma(n, c);
    for (int k = 0; k < 2; ++k) weighted[k] += gamma * sums[(k * groups.norm.samples + n) * channels + c];
  }
  for (int k = 0; k < 2; ++k) {
    const float sum = warp_reduce<Sum>(weighted[k]);
    if (threadIdx.x % kWarp == 0) of_channel[k * channels + c] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    tables_kernel(const float* sums, Groups groups, float* grad_weight, float* grad_bias) {
  const std::int64_t group = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t channels = groups.norm.channels;
  const std::int64_t all_groups = groups.norm.samples * channels;
  if (group >= all_groups) return;
  const std::int64_t sample = group / channels;
  const std::int64_t c = group - sample * channels;
  const std::int64_t row = groups.norm.row(sample);
  if (row < 0) return;
  for (std::int64_t n = 0; n < sample; ++n) {
    if (groups.norm.labels[n] == row) return;
  }
  float weight = 0.0f;
  float bias = 0.0f;
  for (std::int64_t n = sample; n < groups.norm.samples; ++n) {
    if (groups.norm.labels[n] != row) continue;
    weight += sums[n * channels + c];
    bias += sums[all_groups + n * channels + c];
  }
  grad_weight[row * channels + c] = weight;
  grad_bias[row * channels + c] = bias;
}

__global__ void __launch_bounds__(kThreads) clear_kernel(float* first, float* second, std::int64_t count) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  first[i] = 0.0f;
  second[i] = 0.0f;
}

template <class T>
struct Backward : ChannelOperation<T, 2, 0, true> {
  Groups groups;
  const float* of_channel;
  float count;

  struct Group {
    Normalization normalization;
    float through_mean;
    float through_variance;
  };

  __device__ Group group(std::int64_t g) const {
    const std::int64_t c = g % groups.norm.channels;
    return {groups.at(g), of_channel[groups.norm.channels + c] / count, of_channel[c] / count};
  }

  __device__ float operator()(const float (&in)[2], const Group& group, float (&)[1]) const {
    const Normalization& normalization = group.normalization;
    const float grad_z = through_leaky_relu(in[0], normalization.affine(in[1]), groups.norm.slope);
    return normalization.gradient(grad_z, in[1], group.through_mean, group.through_variance);
  }
};

}  // namespace

void conditional_batch_norm_act(const void* x, void* y, const BatchStatistics& statistics, ElementType type,
                                ChannelShape shape, const ConditionalBatchNorm& norm, float momentum, float epsilon,
                                const Device& device) {
  if (shape.channels == 0) return;
  const Partial partial =
      for_each_channel<Moments>(type, {x}, nullptr, GroupedShape(shape), device,
                                [&](auto& moments) { moments.running_mean = statistics.running_mean; });
  const bool empty = shape.numel() == 0;
  const double count = empty ? 0.0 : static_cast<double>(shape.outer * shape.inner);
  GDFQ_LAUNCH(statistics_kernel, grid_of_warps(shape.channels), dim3(kThreads), device.stream, partial, count, momentum,
              epsilon, statistics);
  if (!empty) {
    for_each_channel<Forward>(type, {x}, y, by_sample(shape, norm.samples), device,
                              [&](auto& forward) { forward.groups = {norm, statistics.mean, statistics.inv_std}; });
  }
  check_launch("conditional_batch_norm_act");
}

void conditional_batch_norm_act_backward(const void* grad_y, const void* x, void* grad_x, float* grad_weight,
                                         float* grad_bias, const float* mean, const float* inv_std, ElementType type,
                                         ChannelShape shape, const ConditionalBatchNorm& norm, const Device& device) {
  const std::int64_t table = norm.classes * shape.channels;
  const auto blocks_for = [](std::int64_t threads) {
    return dim3(static_cast<unsigned>(ceil_divide(threads, kThreads)));
  };
  if (table > 0) {
    GDFQ_LAUNCH(clear_kernel, blocks_for(table), dim3(kThreads), device.stream, grad_weight, grad_bias, table);
  }
  if (shape.numel() > 0) {
    const Groups groups{norm, mean, inv_std};
    const GroupedShape samples = by_sample(shape, norm.samples);
    float* sums = device.scratch(2 * samples.groups());
    float* of_channel = device.scratch(2 * shape.channels);
    const Partial partial = for_each_channel<Sums>(type, {grad_y, x}, nullptr, samples, device,
                                                   [&](auto& operation) { operation.groups = groups; });
    GDFQ_LAUNCH(join_shares_kernel, grid_of_warps(samples.groups()), dim3(kThreads), device.stream, partial, sums);
    GDFQ_LAUNCH(channel_kernel, grid_of_warps(shape.channels), dim3(kThreads), device.stream, sums, groups, of_channel);
    GDFQ_LAUNCH(tables_kernel, blocks_for(samples.groups()), dim3(kThreads), device.stream, sums, groups, grad_weight,
                grad_bias);
    for_each_channel<Backward>(type, {grad_y, x}, grad_x, samples, device, [&](auto& operation) {
      operation.groups = groups;
      operation.of_channel = of_channel;
      operation.count = static_cast<float>(shape.outer * shape.inner);
    });
  }
  check_launch("conditional_batch_norm_act_backward");
}

}  // namespace gdfq::cuda
