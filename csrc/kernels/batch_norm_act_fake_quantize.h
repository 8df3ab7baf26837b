#pragma once

#include "channel_shape.h"
#include "device.h"
#include "parameters.h"

namespace gdfq::cuda {

void batch_norm_act_fake_quantize(const void* x, void* y, ElementType type, ChannelShape shape,
                                  const FrozenBatchNorm& norm, const Ranges& ranges, Activation activation,
                                  const Device& device);

// grad_weight and grad_bias hold shape.channels values and are always written.
void batch_norm_act_fake_quantize_backward(const void* grad_y, const void* x, void* grad_x, float* grad_weight,
                                           float* grad_bias, ElementType type, ChannelShape shape,
                                           const FrozenBatchNorm& norm, const Ranges& ranges, Activation activation,
                                           bool clipped, const Device& device);

}  // namespace gdfq::cuda
