#pragma once

#include "channel_shape.h"
#include "device.h"
#include "parameters.h"

namespace gdfq::cuda {

// mean and variance (biased) of x hold shape.channels values and are always written: NaN where there are no elements.
void batch_norm_act_moments(const void* x, void* y, float* mean, float* variance, ElementType type, ChannelShape shape,
                            const FrozenBatchNorm& norm, Activation activation, const Device& device);

void batch_norm_act_moments_backward(const void* grad_y, const float* grad_mean, const float* grad_variance,
                                     const void* x, const float* mean, void* grad_x, ElementType type,
                                     ChannelShape shape, const FrozenBatchNorm& norm, Activation activation,
                                     const Device& device);

}  // namespace gdfq::cuda
