// Quantizers with given ranges, per tensor or per channel.
// Bytes per element (float32): 8 forward; with the clipped gradient 8 + 1/8 forward and 8 + 1/8 backward.
#include "../kernels/fake_quantize.h"

#include "bit_mask.h"
#include "channels.h"
#include "simd.h"

namespace gdfq::cpu {
namespace {

// Of a quantizer, what each channel has of its own, two numbers, and with what is the same in all (`shared`, that of
// any channel) the quantizer again.
std::array<float, 2> own(const Eq6Quantizer& quantizer) { return {quantizer.scale, quantizer.zero}; }
std::array<float, 2> own(const StepQuantizer& quantizer) { return {quantizer.step, quantizer.low}; }

template <class Parameters>
GDFQ_HD Eq6Quantizer quantizer_at(const Parameters& parameters, const Eq6Quantizer& shared, std::int64_t i) {
  return {parameters.get(0, i), parameters.get(1, i), shared.low, shared.high};
}

template <class Parameters>
GDFQ_HD StepQuantizer quantizer_at(const Parameters& parameters, const StepQuantizer& shared, std::int64_t i) {
  const float low = parameters.get(1, i);
  return {parameters.get(0, i), low, low + (shared.high - shared.low)};
}

template <class Quantizer>
ChannelTable<2> quantizer_table(const ChannelShape& shape, const Ranges& ranges) {
  return ChannelTable<2>(shape, [&](std::int64_t c) { return own(ranges.quantizer<Quantizer>(c)); });
}

template <class Quantizer>
Quantizer shared_by_channels(const Ranges& ranges) {
  return Quantizer::make(0.0f, 1.0f, ranges.bits, ranges.scheme);
}

template <class T, class Parameters, class Quantizer>
GDFQ_CLONES void quantize_run(const T* x, T* y, std::int64_t length, Parameters parameters, Quantizer shared) {
  GDFQ_SIMD
  for (std::int64_t i = 0; i < length; ++i) {
    y[i] = from_float<T>(fake_quantize(to_float(x[i]), quantizer_at(parameters, shared, i)));
  }
}

template <class T, class Parameters, class Quantizer>
GDFQ_CLONES void quantize_clipped_run(const T* x, T* y, std::uint8_t* inside, std::int64_t length,
                                      Parameters parameters, Quantizer shared) {
  GDFQ_SIMD
  for (std::int64_t i = 0; i < length; ++i) {
    const Quantizer quantizer = quantizer_at(parameters, shared, i);
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
  with_quantizer(ranges.scheme, [&](auto scheme) {
    using Quantizer = decltype(scheme);
    const ChannelTable<2> table = quantizer_table<Quantizer>(shape, ranges);
    const auto shared = shared_by_channels<Quantizer>(ranges);
    with_type(type, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for_each_run(table, parallel, [&](std::int64_t offset, std::int64_t length, const auto& parameters) {
        quantize_run(static_cast<const T*>(x) + offset, static_cast<T*>(y) + offset, length, parameters, shared);
      });
    });
  });
}

void fake_quantize_clipped(const void* x, void* y, std::uint8_t* mask, ElementType type, ChannelShape shape,
                           const Ranges& ranges, const Parallel& parallel) {
  const std::int64_t numel = shape.numel();
  if (numel == 0) return;
  with_quantizer(ranges.scheme, [&](auto scheme) {
    using Quantizer = decltype(scheme);
    const ChannelTable<2> table = quantizer_table<Quantizer>(shape, ranges);
    const auto shared = shared_by_channels<Quantizer>(ranges);
    const std::int64_t block = block_size(table);
    with_type(type, [&](auto tag) {
      using T = typename decltype(tag)::type;
      parallel_for(parallel, (numel + block - 1) / block, [&](std::int64_t first, std::int64_t last) {
        std::vector<std::uint8_t> inside(static_cast<std::size_t>(block));
        for (std::int64_t begin = first * block; begin < std::min(last * block, numel); begin += block) {
          const std::int64_t end = std::min(begin + block, numel);
          for_each_run(table, begin, end, [&](std::int64_t offset, std::int64_t length, const auto& parameters) {
            quantize_clipped_run(static_cast<const T*>(x) + offset, static_cast<T*>(y) + offset,
                                 inside.data() + (offset - begin), length, parameters, shared);
          });
          pack_bits(inside.data(), end - begin, mask + begin / 8);
        }
      });
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
