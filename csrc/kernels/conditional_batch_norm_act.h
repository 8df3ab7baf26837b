#pragma once

#include "channel_shape.h"
#include "device.h"
#include "element_type.h"

namespace gdfq::cuda {

// Batch normalization in training with a row of `weight` and `bias`, (classes, channels), for the label of each sample.
struct ConditionalBatchNorm {
  const float* weight;
  const float* bias;
  const std::int64_t* labels;  // one for each sample; a label that is no row makes the sample NaN
  std::int64_t samples;
  std::int64_t classes;
  float slope;  // of LeakyReLU below 0; 1 for none

  // The row of a sample, -1 for none.
  GDFQ_HD std::int64_t row(std::int64_t sample) const {
    const std::int64_t label = labels[sample];
    return label >= 0 && label < classes ? label : -1;
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
};

// shape, with its outer size even where there is one channel: samples and, in channels_last, their pixels. Without elements,
// mean and inv_std are NaN and the running statistics stay as they are.
void conditional_batch_norm_act(const void* x, void* y, const BatchStatistics& statistics, ElementType type,
                                ChannelShape shape, const ConditionalBatchNorm& norm, float momentum, float epsilon,
                                const Device& device);

// grad_weight and grad_bias are (classes, channels) and written whole.
void conditional_batch_norm_act_backward(const void* grad_y, const void* x, void* grad_x, float* grad_weight,
                                         float* grad_bias, const float* mean, const float* inv_std, ElementType type,
                                         ChannelShape shape, const ConditionalBatchNorm& norm, const Device& device);

}  // namespace gdfq::cuda
