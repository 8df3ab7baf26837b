#pragma once

#include "../kernels/element_type.h"
#include "../kernels/parameters.h"
#include "channels.h"
#include "parallel.h"

namespace gdfq::cpu {

void batch_norm_act_fake_quantize(const void* x, void* y, ElementType type, ChannelShape shape,
                                  const FrozenBatchNorm& norm, const Ranges& ranges, Activation activation,
                                  const Parallel& parallel);

// grad_weight and grad_bias hold shape.channels values and are always written.
void batch_norm_act_fake_quantize_backward(const void* grad_y, const void* x, void* grad_x, float* grad_weight,
                                           float* grad_bias, ElementType type, ChannelShape shape,
                                           const FrozenBatchNorm& norm, const Ranges& ranges,
                                           Activation activation, bool clipped, const Parallel& parallel);

}  // namespace gdfq::cpu
