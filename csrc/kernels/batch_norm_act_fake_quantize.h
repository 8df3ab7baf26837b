#pragma once

#include "channel_shape.h"
#include "kernel.h"
#include "parameters.h"

namespace gdfq {

GDFQ_KERNEL(batch_norm_act_fake_quantize, const void* x, void* y, ElementType type, ChannelShape shape,
            const FrozenBatchNorm& norm, const Ranges& ranges, Activation activation)

// grad_weight and grad_bias hold shape.channels values and are always written.
GDFQ_KERNEL(batch_norm_act_fake_quantize_backward, const void* grad_y, const void* x, void* grad_x, float* grad_weight,
            float* grad_bias, ElementType type, ChannelShape shape, const FrozenBatchNorm& norm, const Ranges& ranges,
            Activation activation, bool clipped)

}  // namespace gdfq
