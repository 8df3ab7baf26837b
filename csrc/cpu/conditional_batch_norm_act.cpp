// The generator's batch normalization, with statistics of the batch, gamma and beta chosen by each sample's label, and
// LeakyReLU.
// Bytes per element (float32): 12 forward (the statistics need a pass of their own), 20 backward (the sums over a
// channel do, too).
//
// The statistics belong to the channels of the batch. In all other passes each sample is a tensor of its own, whose
// channels have one gamma and one beta.
#include "../kernels/conditional_batch_norm_act.h"

#include "channel_sums.h"
#include "simd.h"

namespace gdfq::cpu {
namespace {

// Adds d and d^2 with d = x - center.
template <class T, class Parameters>
GDFQ_CLONES void deviations_run(const T* x, std::int64_t length, Parameters parameters, Accumulators accumulators) {
  const auto strip = [&](std::int64_t begin, std::int64_t count, Accumulators sums) GDFQ_INLINE_LAMBDA {
    GDFQ_SIMD
    GDFQ_ROLLED
    for (std::int64_t i = 0; i < count; ++i) {
      const float deviation = to_float(x[begin + i]) - parameters.get(0, i);
      sums.first[i] += deviation;
      sums.second[i] += deviation * deviation;
    }
  };
  for_each_strip(length, parameters, accumulators, strip);
}

template <class Parameters>
GDFQ_HD Normalization normalization_at(const Parameters& parameters, std::int64_t i) {
  return {parameters.get(0, i), parameters.get(1, i), parameters.get(2, i), parameters.get(3, i)};
}

template <class T, class Parameters>
GDFQ_CLONES void forward_run(const T* x, T* y, std::int64_t length, Parameters parameters, float slope) {
  GDFQ_SIMD
  for (std::int64_t i = 0; i < length; ++i) {
    y[i] = from_float<T>(leaky_relu(normalization_at(parameters, i).affine(to_float(x[i])), slope));
  }
}

// Adds dz * xhat and dz, where dz is the gradient of z.
template <class T, class Parameters>
GDFQ_CLONES void sums_run(const T* grad_y, const T* x, std::int64_t length, Parameters parameters, float slope,
                          Accumulators accumulators) {
  const auto strip = [&](std::int64_t begin, std::int64_t count, Accumulators sums) GDFQ_INLINE_LAMBDA {
    GDFQ_SIMD
    for (std::int64_t i = 0; i < count; ++i) {
      const Normalization normalization = normalization_at(parameters, i);
      const float value = to_float(x[begin + i]);
      const float grad_z = through_leaky_relu(to_float(grad_y[begin + i]), normalization.affine(value), slope);
      sums.first[i] += grad_z * normalization.normalized(value);
      sums.second[i] += grad_z;
    }
  };
  for_each_strip(length, parameters, accumulators, strip);
}

// Parameters: the normalization, and the channel's means that the gradient takes through the batch's mean and variance.
template <class T, class Parameters>
GDFQ_CLONES void backward_run(const T* grad_y, const T* x, T* grad_x, std::int64_t length, Parameters parameters,
                              float slope) {
  GDFQ_SIMD
  for (std::int64_t i = 0; i < length; ++i) {
    const Normalization normalization = normalization_at(parameters, i);
    const float value = to_float(x[i]);
    const float grad_z = through_leaky_relu(to_float(grad_y[i]), normalization.affine(value), slope);
    grad_x[i] = from_float<T>(normalization.gradient(grad_z, value, parameters.get(4, i), parameters.get(5, i)));
  }
}

// Sums of x - center(c) and of its square.
template <class T, class Center>
ChannelSums sum_deviations(const T* x, const ChannelShape& shape, const Parallel& parallel, const Center& center) {
  const ChannelTable<1> table(shape, [&](std::int64_t c) { return std::array<float, 1>{center(c)}; });
  return sum_channels(table, parallel,
                      [&](std::int64_t offset, std::int64_t length, const auto& parameters, Accumulators accumulators) {
                        deviations_run(x + offset, length, parameters, accumulators);
                      });
}

double count_per_channel(const ChannelShape& shape) { return static_cast<double>(shape.outer * shape.inner); }

// A batch with at least one element, and what normalizes it.
struct Batch {
  ChannelShape whole;
  ChannelShape sample;  // of one sample
  ConditionalBatchNorm norm;
  const float* mean;
  const float* inv_std;

  static Batch of(const ChannelShape& shape, const ConditionalBatchNorm& norm, const float* mean,
                  const float* inv_std) {
    return {ChannelShape::of(shape.numel(), shape.channels, shape.inner),
            ChannelShape::of(shape.numel() / norm.samples, shape.channels, shape.inner), norm, mean, inv_std};
  }

  // Of channel c of sample n, as normalization_at reads them.
  std::array<float, 4> parameters(std::int64_t n, std::int64_t c) const {
    const Normalization normalization = norm.at(n, c, mean, inv_std);
    return {normalization.mean, normalization.inv_std, normalization.weight, normalization.bias};
  }

  // Calls run(n, offset of its first element, parallel) for every sample n. Many samples share the threads among them;
  // of few, each has all threads to itself.
  template <class Run>
  void for_each_sample(const Parallel& parallel, const Run& run) const {
    constexpr std::int64_t kMany = 16;
    if (norm.samples < kMany) {
      for (std::int64_t n = 0; n < norm.samples; ++n) run(n, n * sample.numel(), parallel);
      return;
    }
    parallel_for(parallel, norm.samples, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t n = begin; n < end; ++n) run(n, n * sample.numel(), kSerial);
    });
  }
};

template <class T>
void set_statistics(const T* x, const Batch& batch, const BatchStatistics& statistics, float momentum, float epsilon,
                    const Parallel& parallel) {
  // The first sample's mean is at most sqrt(samples) standard deviations from the batch's, however far both are from 0:
  // sums of deviations from it do not cancel.
  const ChannelSums first = sum_deviations(x, batch.sample, parallel, [](std::int64_t) { return 0.0f; });
  const auto center = [&](std::int64_t c) {
    return static_cast<float>(first.first[static_cast<std::size_t>(c)] / count_per_channel(batch.sample));
  };
  const ChannelSums sums = sum_deviations(x, batch.whole, parallel, center);
  for (std::int64_t c = 0; c < batch.whole.channels; ++c) {
    const auto channel = static_cast<std::size_t>(c);
    statistics.set(c, static_cast<double>(center(c)), sums.first[channel], sums.second[channel],
                   count_per_channel(batch.whole), momentum, epsilon);
  }
}

template <class T>
void normalize(const T* x, T* y, const Batch& batch, const Parallel& parallel) {
  batch.for_each_sample(parallel, [&](std::int64_t n, std::int64_t begin, const Parallel& threads) {
    const ChannelTable<4> table(batch.sample, [&](std::int64_t c) { return batch.parameters(n, c); });
    for_each_run(table, threads, [&](std::int64_t offset, std::int64_t length, const auto& parameters) {
      forward_run(x + begin + offset, y + begin + offset, length, parameters, batch.norm.slope);
    });
  });
}

// Sums of dz * xhat and of dz over each channel, for every sample.
template <class T>
std::vector<ChannelSums> sum_gradients(const T* grad_y, const T* x, const Batch& batch, const Parallel& parallel) {
  std::vector<ChannelSums> sums(static_cast<std::size_t>(batch.norm.samples), ChannelSums(0));
  batch.for_each_sample(parallel, [&](std::int64_t n, std::int64_t begin, const Parallel& threads) {
    const ChannelTable<4> table(batch.sample, [&](std::int64_t c) { return batch.parameters(n, c); });
    sums[static_cast<std::size_t>(n)] = sum_channels(
        table, threads,
        [&](std::int64_t offset, std::int64_t length, const auto& parameters, Accumulators accumulators) {
          sums_run(grad_y + begin + offset, x + begin + offset, length, parameters, batch.norm.slope, accumulators);
        });
  });
  return sums;
}

// Adds the samples' sums to the rows of their labels.
void add_to_tables(const std::vector<ChannelSums>& of_samples, const ConditionalBatchNorm& norm, float* grad_weight,
                   float* grad_bias) {
  std::fill_n(grad_weight, norm.classes * norm.channels, 0.0f);
  std::fill_n(grad_bias, norm.classes * norm.channels, 0.0f);
  for (std::size_t n = 0; n < of_samples.size(); ++n) {
    const std::int64_t row = norm.row(static_cast<std::int64_t>(n));
    if (row < 0) continue;
    for (std::int64_t c = 0; c < norm.channels; ++c) {
      const auto channel = static_cast<std::size_t>(c);
      grad_weight[row * norm.channels + c] += static_cast<float>(of_samples[n].first[channel]);
      grad_bias[row * norm.channels + c] += static_cast<float>(of_samples[n].second[channel]);
    }
  }
}

// The means of gamma * dz * xhat and of gamma * dz over each channel of the batch. A sample without a row makes them
// NaN.
ChannelSums mean_gradients(const std::vector<ChannelSums>& of_samples, const Batch& batch) {
  ChannelSums means(batch.whole.channels);
  const double count = count_per_channel(batch.whole);
  for (std::size_t n = 0; n < of_samples.size(); ++n) {
    for (std::size_t c = 0; c < means.first.size(); ++c) {
      const float gamma = batch.norm.gamma(static_cast<std::int64_t>(n), static_cast<std::int64_t>(c));
      const double weight = static_cast<double>(gamma) / count;
      means.first[c] += weight * of_samples[n].first[c];
      means.second[c] += weight * of_samples[n].second[c];
    }
  }
  return means;
}

// The gradient of x, from the means of the channels.
template <class T>
void propagate(const T* grad_y, const T* x, T* grad_x, const Batch& batch, const ChannelSums& means,
               const Parallel& parallel) {
  batch.for_each_sample(parallel, [&](std::int64_t n, std::int64_t begin, const Parallel& threads) {
    const ChannelTable<6> table(batch.sample, [&](std::int64_t c) {
      const auto [mean, inv_std, gamma, beta] = batch.parameters(n, c);
      const auto channel = static_cast<std::size_t>(c);
      return std::array<float, 6>{mean,
                                  inv_std,
                                  gamma,
                                  beta,
                                  static_cast<float>(means.second[channel]),
                                  static_cast<float>(means.first[channel])};
    });
    for_each_run(table, threads, [&](std::int64_t offset, std::int64_t length, const auto& parameters) {
      backward_run(grad_y + begin + offset, x + begin + offset, grad_x + begin + offset, length, parameters,
                   batch.norm.slope);
    });
  });
}

}  // namespace

void conditional_batch_norm_act(const void* x, void* y, const BatchStatistics& statistics, ElementType type,
                                ChannelShape shape, const ConditionalBatchNorm& norm, float momentum, float epsilon,
                                const Parallel& parallel) {
  if (shape.numel() == 0) {
    for (std::int64_t c = 0; c < shape.channels; ++c) statistics.set(c, 0.0, 0.0, 0.0, 0.0, momentum, epsilon);
    return;
  }
  const Batch batch = Batch::of(shape, norm, statistics.mean, statistics.inv_std);
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    set_statistics(static_cast<const T*>(x), batch, statistics, momentum, epsilon, parallel);
    normalize(static_cast<const T*>(x), static_cast<T*>(y), batch, parallel);
  });
}

void conditional_batch_norm_act_backward(const void* grad_y, const void* x, void* grad_x, float* grad_weight,
                                         float* grad_bias, const float* mean, const float* inv_std, ElementType type,
                                         ChannelShape shape, const ConditionalBatchNorm& norm,
                                         const Parallel& parallel) {
  if (shape.numel() == 0) {
    add_to_tables({}, norm, grad_weight, grad_bias);
    return;
  }
  const Batch batch = Batch::of(shape, norm, mean, inv_std);
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* gradients = static_cast<const T*>(grad_y);
    const auto* elements = static_cast<const T*>(x);
    const std::vector<ChannelSums> of_samples = sum_gradients(gradients, elements, batch, parallel);
    add_to_tables(of_samples, norm, grad_weight, grad_bias);
    propagate(gradients, elements, static_cast<T*>(grad_x), batch, mean_gradients(of_samples, batch), parallel);
  });
}

}  // namespace gdfq::cpu
