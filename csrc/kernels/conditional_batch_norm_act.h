#pragma once

#include "channel_shape.h"
#include "element_type.h"
#include "kernel.h"
#include "normalization.h"

namespace gdfq {

// shape, with its outer size even where there is one channel: samples and, in channels_last, their pixels. Without
// elements, mean and inv_std are NaN and the running statistics stay as they are.
GDFQ_KERNEL(conditional_batch_norm_act, const void* x, void* y, const BatchStatistics& statistics, ElementType type,
            ChannelShape shape, const ConditionalBatchNorm& norm, float momentum, float epsilon)

// grad_weight and grad_bias are (classes, channels) and written whole.
GDFQ_KERNEL(conditional_batch_norm_act_backward, const void* grad_y, const void* x, void* grad_x, float* grad_weight,
            float* grad_bias, const float* mean, const float* inv_std, ElementType type, ChannelShape shape,
            const ConditionalBatchNorm& norm)

}  // namespace gdfq
