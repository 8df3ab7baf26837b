#pragma once

#include "channels.h"
#include "element_type.h"
#include "frozen_batch_norm.h"
#include "parallel.h"

namespace gdfq::cpu {

void batch_norm_act_fake_quantize(const void* x, void* y, ElementType type, ChannelShape shape,
                                  const FrozenBatchNorm& norm, const Quantizer& quantizer, Activation activation,
                                  const Parallel& parallel);

// grad_weight and grad_bias hold shape.channels values and are always written.
void batch_norm_act_fake_quantize_backward(const void* grad_y, const void* x, void* grad_x, float* grad_weight,
                                           float* grad_bias, ElementType type, ChannelShape shape,
                                           const FrozenBatchNorm& norm, const Quantizer& quantizer,
                                           Activation activation, bool clipped, const Parallel& parallel);

}  // namespace gdfq::cpu
