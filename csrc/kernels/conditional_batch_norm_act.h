#pragma once

#include "channel_shape.h"
#include "device.h"
#include "element_type.h"
#include "normalization.h"

namespace gdfq::cuda {

// shape, with its outer size even where there is one channel: samples and, in channels_last, their pixels. Without
// elements, mean and inv_std are NaN and the running statistics stay as they are.
void conditional_batch_norm_act(const void* x, void* y, const BatchStatistics& statistics, ElementType type,
                                ChannelShape shape, const ConditionalBatchNorm& norm, float momentum, float epsilon,
                                const Device& device);

// grad_weight and grad_bias are (classes, channels) and written whole.
void conditional_batch_norm_act_backward(const void* grad_y, const void* x, void* grad_x, float* grad_weight,
                                         float* grad_bias, const float* mean, const float* inv_std, ElementType type,
                                         ChannelShape shape, const ConditionalBatchNorm& norm, const Device& device);

}  // namespace gdfq::cuda
