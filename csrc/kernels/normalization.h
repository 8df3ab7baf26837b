// Batch normalization in training, with gamma and beta chosen by each sample's label, and LeakyReLU: one element at a
// time, for the host and for CUDA.
//
//   xhat = (x - mean_c) / sqrt(var_c + epsilon)        y = leaky(weight[label_n, c] * xhat + bias[label_n, c])
#pragma once

#include <cmath>
#include <cstdint>

#include "quantizer.h"

namespace gdfq {

// What the elements of one channel of one sample share.
struct Normalization {
  float mean;
  float inv_std;
  float weight;
  float bias;

  GDFQ_HD float normalized(float x) const { return (x - mean) * inv_std; }
  GDFQ_HD float affine(float x) const { return weight * normalized(x) + bias; }

  // The gradient of x. The statistics depend on every x of the channel: through them it also takes the channel's means
  // of weight * grad_z and of weight * grad_z * xhat.
  GDFQ_HD float gradient(float grad_z, float x, float through_mean, float through_variance) const {
    return inv_std * (weight * grad_z - through_mean - normalized(x) * through_variance);
  }
};

GDFQ_HD float leaky_relu(float z, float slope) { return z < 0.0f ? z * slope : z; }

GDFQ_HD float through_leaky_relu(float grad_y, float z, float slope) { return z > 0.0f ? grad_y : grad_y * slope; }

// A row of `weight` and `bias`, (classes, channels), for the label of each sample.
struct ConditionalBatchNorm {
  const float* weight;
  const float* bias;
  const std::int64_t* labels;  // one for each sample; a label that is no row makes the sample NaN
  std::int64_t samples;
  std::int64_t classes;
  std::int64_t channels;
  float slope;  // of LeakyReLU below 0; 1 for none

  // The row of a sample, -1 for none.
  GDFQ_HD std::int64_t row(std::int64_t sample) const {
    const std::int64_t label = labels[sample];
    return label >= 0 && label < classes ? label : -1;
  }

  GDFQ_HD float gamma(std::int64_t sample, std::int64_t c) const { return of_label(weight, sample, c); }
  GDFQ_HD float beta(std::int64_t sample, std::int64_t c) const { return of_label(bias, sample, c); }

  // mean and inv_std have one value for each channel.
  GDFQ_HD Normalization at(std::int64_t sample, std::int64_t c, const float* mean, const float* inv_std) const {
    return {mean[c], inv_std[c], gamma(sample, c), beta(sample, c)};
  }

 private:
  GDFQ_HD float of_label(const float* table, std::int64_t sample, std::int64_t c) const {
    const std::int64_t sample_row = row(sample);
    return sample_row < 0 ? NAN : table[sample_row * channels + c];
  }
};

// One float for each channel.
struct BatchStatistics {
  const float* running_mean;
  const float* running_var;
  float* mean;
  float* inv_std;           // 1 / sqrt(biased variance + epsilon)
  float* new_running_mean;  // (1 - momentum) * running + momentum * new, the variance unbiased
  float* new_running_var;

  // From the sums of x - center and of its square over the `count` elements of channel c. Without elements, mean and
  // inv_std are NaN and the running statistics stay as they are.
  GDFQ_HD void set(std::int64_t c, double center, double sum, double sum_of_squares, double count, float momentum,
                   float epsilon) const {
    const double deviation = sum / count;
    const double square = sum_of_squares / count - deviation * deviation;
    const double variance = square < 0.0 ? 0.0 : square;
    const double old_mean = running_mean[c];
    const double old_variance = running_var[c];
    const double new_mean = center + deviation;
    const double unbiased = variance * count / (count - 1.0);
    mean[c] = static_cast<float>(new_mean);
    inv_std[c] = static_cast<float>(1.0 / sqrt(variance + static_cast<double>(epsilon)));
    const bool empty = count == 0.0;
    new_running_mean[c] = static_cast<float>(empty ? old_mean : old_mean + momentum * (new_mean - old_mean));
    new_running_var[c] = static_cast<float>(empty ? old_variance : old_variance + momentum * (unbiased - old_variance));
  }
};

}  // namespace gdfq
