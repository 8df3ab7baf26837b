#pragma once

#include "channel_shape.h"
#include "kernel.h"
#include "parameters.h"

namespace gdfq {

// mean and variance (biased) of x hold shape.channels values and are always written: NaN where there are no elements.
GDFQ_KERNEL(batch_norm_act_moments, const void* x, void* y, float* mean, float* variance, ElementType type,
            ChannelShape shape, const FrozenBatchNorm& norm, Activation activation)

GDFQ_KERNEL(batch_norm_act_moments_backward, const void* grad_y, const float* grad_mean, const float* grad_variance,
            const void* x, const float* mean, void* grad_x, ElementType type, ChannelShape shape,
            const FrozenBatchNorm& norm, Activation activation)

}  // namespace gdfq
