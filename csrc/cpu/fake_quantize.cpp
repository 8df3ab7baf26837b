// Eq. 6 with given ranges, per tensor or per channel.
// Bytes per element (float32): 8 forward; with the clipped gradient 8 + 1/8 forward and 8 + 1/8 backward.
#include "../kernels/fake_quantize.h"

#include "bit_mask.h"
#include "channels.h"
#include "simd.h"

namespace gdfq::cpu {
namespace {

// What the elements of a channel share: the quantizer, whose first and last level are the same for all channels.
struct Levels {
  float low;
  float high;
};

ChannelTable<2> quantizer_table(const ChannelShape& shape, const Ranges& ranges) {
  return ChannelTable<2>(shape, [&](std::int64_t c) {
    const Quantizer quantizer = ranges.quantizer(c);
    return std::array<float, 2>{quantizer.scale, quantizer.zero};
  });
}

Levels levels_of(int bits) {
  const Quantizer quantizer = make_quantizer(0.0f, 1.0f, bits);
  return {quantizer.low, quantizer.high};
}

template <class Parameters>
GDFQ_HD Quantizer quantizer_at(const Parameters& parameters, const Levels& levels, std::int64_t i) {
  return {parameters.get(0, i), parameters.get(1, i), levels.low, levels.high};
}

template <class T, class Parameters>
GDFQ_CLONES void quantize_run(const T* x, T* y, std::int64_t length, Parameters parameters, Levels levels) {
  GDFQ_SIMD
  for (std::int64_t i = 0; i < length; ++i) {
    y[i] = from_float<T>(fake_quantize(to_float(x[i]), quantizer_at(parameters, levels, i)));
  }
}

template <class T, class Parameters>
GDFQ_CLONES void quantize_clipped_run(const T* x, T* y, std::uint8_t* inside, std::int64_t length,
                                      Parameters parameters, Levels levels) {
  GDFQ_SIMD
  for (std::int64_t i = 0; i < length; ++i) {
    const Quantizer quantizer = quantizer_at(parameters, levels, i);
    const float level = round_to_level(to_float(x[i]), quantizer);
    inside[i] = is_inside(level, quantizer);
    y[i] = from_float<T>(dequantize(clamp_level(level, quantizer), quantizer));
  }
}

template <class T>
GDFQ_CLONES void select_run(const T* grad_y, const std::uint8_t* inside, T* grad_x, std::int64_t length) {
  GDFQ_SIMD
  for (std::int64_t i = 0; i < length; ++i) {
    const float gradient = to_float(grad_y[i]);
    grad_x[i] = from_float<T>(inside[i] ? gradient : 0.0f);
  }
}

}  // namespace

void fake_quantize(const void* x, void* y, ElementType type, ChannelShape shape, const Ranges& ranges,
                   const Parallel& parallel) {
  if (shape.numel() == 0) return;
  const ChannelTable<2> table = quantizer_table(shape, ranges);
  const Levels levels = levels_of(ranges.bits);
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_each_run(table, parallel, [&](std::int64_t offset, std::int64_t length, const auto& parameters) {
      quantize_run(static_cast<const T*>(x) + offset, static_cast<T*>(y) + offset, length, parameters, levels);
    });
  });
}

void fake_quantize_clipped(const void* x, void* y, std::uint8_t* mask, ElementType type, ChannelShape shape,
                           const Ranges& ranges, const Parallel& parallel) {
  const std::int64_t numel = shape.numel();
  if (numel == 0) return;
  const ChannelTable<2> table = quantizer_table(shape, ranges);
  const Levels levels = levels_of(ranges.bits);
  const std::int64_t block = block_size(table);
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(parallel, (numel + block - 1) / block, [&](std::int64_t first, std::int64_t last) {
      std::vector<std::uint8_t> inside(static_cast<std::size_t>(block));
      for (std::int64_t begin = first * block; begin < std::min(last * block, numel); begin += block) {
        const std::int64_t end = std::min(begin + block, numel);
        for_each_run(table, begin, end, [&](std::int64_t offset, std::int64_t length, const auto& parameters) {
          quantize_clipped_run(static_cast<const T*>(x) + offset, static_cast<T*>(y) + offset,
                               inside.data() + (offset - begin), length, parameters, levels);
        });
        pack_bits(inside.data(), end - begin, mask + begin / 8);
      }
    });
  });
}

void fake_quantize_clipped_backward(const void* grad_y, const std::uint8_t* mask, void* grad_x, ElementType type,
                                    std::int64_t numel, const Parallel& parallel) {
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(parallel, (numel + kBlock - 1) / kBlock, [&](std::int64_t first, std::int64_t last) {
      std::uint8_t inside[kBlock];
      for (std::int64_t begin = first * kBlock; begin < std::min(last * kBlock, numel); begin += kBlock) {
        const std::int64_t length = std::min(kBlock, numel - begin);
        unpack_bits(mask + begin / 8, length, inside);
        select_run(static_cast<const T*>(grad_y) + begin, inside, static_cast<T*>(grad_x) + begin, length);
      }
    });
  });
}

}  // namespace gdfq::cpu
