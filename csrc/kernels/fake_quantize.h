#pragma once

#include "channel_shape.h"
#include "kernel.h"
#include "parameters.h"

namespace gdfq {

// ranges holds one range for each of shape.channels channels.
GDFQ_KERNEL(fake_quantize, const void* x, void* y, ElementType type, ChannelShape shape, const Ranges& ranges)

// Also writes the bit mask of the elements that were not clipped: ceil(numel / 8) bytes.
GDFQ_KERNEL(fake_quantize_clipped, const void* x, void* y, std::uint8_t* mask, ElementType type, ChannelShape shape,
            const Ranges& ranges)

GDFQ_KERNEL(fake_quantize_clipped_backward, const void* grad_y, const std::uint8_t* mask, void* grad_x,
            ElementType type, std::int64_t numel)

}  // namespace gdfq
