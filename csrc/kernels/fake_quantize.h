#pragma once

#include "channel_shape.h"
#include "device.h"
#include "parameters.h"

namespace gdfq::cuda {

// ranges holds one range for each of shape.channels channels.
void fake_quantize(const void* x, void* y, ElementType type, ChannelShape shape, const Ranges& ranges,
                   const Device& device);

// Also writes the bit mask of the elements that were not clipped: ceil(numel / 8) bytes.
void fake_quantize_clipped(const void* x, void* y, std::uint8_t* mask, ElementType type, ChannelShape shape,
                           const Ranges& ranges, const Device& device);

void fake_quantize_clipped_backward(const void* grad_y, const std::uint8_t* mask, void* grad_x, ElementType type,
                                    std::int64_t numel, const Device& device);

}  // namespace gdfq::cuda
