// Quantizers with given ranges, per tensor or per channel, and the gradient that is zero where a value was clipped.
//
// Bytes per element (float32): 8 forward; with the clipped gradient 8 + 1/8 forward and 8 + 1/8 backward.
//
// Launch: the tensor is one row of 16-byte vectors in memory order, whatever its layout; neighbouring threads take
// neighbouring vectors, kUnroll of them each, all loaded before the first is worked on. Where the data is not aligned a
// vector is one element. The range of the tensor stays in registers; a channel's is made anew where the channel
// changes. Of the mask, the 8 / N lanes whose elements share a byte put it together with shuffles, and one of them
// writes it.
#include "fake_quantize.h"

#include "divider.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace gdfq::cuda {
namespace {

constexpr int kUnroll = 4;

struct ChannelDividers {
  ChannelShape shape;
  bool fit_32_bits;
  Divider inner;
  Divider channels;

  explicit ChannelDividers(const ChannelShape& shape)
      : shape(shape),
        fit_32_bits(shape.numel() < std::int64_t{1} << 31),
        inner(shape.inner),
        channels(shape.channels) {}
};

// Walks along elements from `first` on, with the quantizer of each: here the same for all.
template <class Quantizer>
struct RangeOfTensor {
  Fast<Quantizer> quantizer;

  __device__ explicit RangeOfTensor(const Ranges& ranges, const ChannelDividers&)
      : quantizer(make_fast(ranges.quantizer<Quantizer>())) {}
  __device__ void start(std::int64_t) {}
  __device__ Fast<Quantizer> next() const { return quantizer; }
};

// The channel of an element is (index / inner) % channels.
template <class Quantizer>
class RangeOfChannel {
 public:
  __device__ RangeOfChannel(const Ranges& ranges, const ChannelDividers& by) : ranges_(ranges), by_(by) {}

  __device__ void start(std::int64_t first) {
    std::int64_t run, round;
    if (by_.fit_32_bits) {
      run = by_.inner.quotient(static_cast<std::uint32_t>(first));
      round = by_.channels.quotient(static_cast<std::uint32_t>(run));
    } else {
      run = first / by_.shape.inner;
      round = run / by_.shape.channels;
    }
    position_ = first - run * by_.shape.inner;
    channel_ = static_cast<int>(run - round * by_.shape.channels);
    quantizer_ = ranges_.quantizer<Quantizer>(channel_);
  }

  __device__ Quantizer next() {
    const Quantizer here = quantizer_;
    if (++position_ == by_.shape.inner) {
      position_ = 0;
      channel_ = channel_ + 1 == by_.shape.channels ? 0 : channel_ + 1;
      quantizer_ = ranges_.quantizer<Quantizer>(channel_);
    }
    return here;
  }

 private:
  const Ranges& ranges_;
  const ChannelDividers& by_;
  Quantizer quantizer_{};
  int channel_ = 0;
  std::int64_t position_ = 0;  // in the channel's run of `inner` elements
};

// The first element of this thread's u-th vector.
template <int N>
__device__ __forceinline__ std::int64_t first_element(int u) {
  return ((static_cast<std::int64_t>(blockIdx.x) * kUnroll + u) * kThreads + threadIdx.x) * N;
}

// N elements, or those of them that there are.
template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_some(const T* x, std::int64_t first, std::int64_t numel) {
  if (first + N <= numel) return load<N>(x + first);
  Vector<T, N> some{};
  for (int v = 0; v < N && first + v < numel; ++v) some.at[v] = x[first + v];
  return some;
}

template <int N, class T>
__device__ __forceinline__ void store_some(T* y, std::int64_t first, std::int64_t numel, const Vector<T, N>& vector) {
  if (first + N <= numel) {
    store(y + first, vector);
    return;
  }
  for (int v = 0; v < N && first + v < numel; ++v) y[first + v] = vector.at[v];
}

// Each lane has N flags in the low bits; all lanes of the warp call. Flags past the end are written as 0.
template <int N>
__device__ __forceinline__ void store_flags(std::uint8_t* mask, std::int64_t first, std::int64_t numel,
                                            unsigned flags) {
  constexpr int lanes = 8 / N;
  if (first + N > numel) flags &= first < numel ? (1u << (numel - first)) - 1u : 0u;
  unsigned byte = flags << (threadIdx.x % lanes * N);
#pragma unroll
  for (int distance = 1; distance < lanes; distance *= 2) byte |= __shfl_xor_sync(kAllLanes, byte, distance);
  if (threadIdx.x % lanes == 0 && first < numel) mask[first / 8] = static_cast<std::uint8_t>(byte);
}

// mask: null where it is not wanted.
template <class T, int N, class RangeOf>
__global__ void GDFQ_LAUNCH_BOUNDS(4)
    fake_quantize_kernel(const T* x, T* y, std::uint8_t* mask, std::int64_t numel, Ranges ranges, ChannelDividers by) {
  Vector<T, N> in[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) in[u] = load_some<N>(x, first_element<N>(u), numel);
  RangeOf walk(ranges, by);  // makes a quantizer while the elements are on their way
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const std::int64_t first = first_element<N>(u);
    Vector<T, N> out;
    unsigned flags = 0;
    if (first < numel) walk.start(first);
#pragma unroll
    for (int v = 0; v < N; ++v) {
      const auto quantizer = walk.next();
      const float level = round_to_level(to_float(in[u].at[v]), quantizer);
      out.at[v] = from_float<T>(dequantize(clamp_level(level, quantizer), quantizer));
      if (is_inside(level, quantizer)) flags |= 1u << v;
    }
    store_some<N>(y, first, numel, out);
    if (mask != nullptr) store_flags<N>(mask, first, numel, flags);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    clipped_backward_kernel(const T* grad_y, const std::uint8_t* mask, T* grad_x, std::int64_t numel) {
  Vector<T, N> in[kUnroll];
  unsigned flags[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const std::int64_t first = first_element<N>(u);
    in[u] = load_some<N>(grad_y, first, numel);
    flags[u] = first < numel ? static_cast<unsigned>(mask[first / 8]) >> (first % 8) : 0u;
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    Vector<T, N> out;
#pragma unroll
    for (int v = 0; v < N; ++v) out.at[v] = (flags[u] >> v & 1u) != 0 ? in[u].at[v] : from_float<T>(0.0f);
    store_some<N>(grad_x, first_element<N>(u), numel, out);
  }
}

template <int N>
dim3 grid_of(std::int64_t numel) {
  return dim3(static_cast<unsigned>(ceil_divide(numel, std::int64_t{kThreads} * kUnroll * N)));
}

template <class T, int N>
void quantize(const T* x, T* y, std::uint8_t* mask, const ChannelShape& shape, const Ranges& ranges,
              const Device& device) {
  const std::int64_t numel = shape.numel();
  with_quantizer(ranges.scheme, [&](auto scheme) {
    using Quantizer = decltype(scheme);
    const auto kernel = shape.channels == 1 ? fake_quantize_kernel<T, N, RangeOfTensor<Quantizer>>
                                            : fake_quantize_kernel<T, N, RangeOfChannel<Quantizer>>;
    GDFQ_LAUNCH(kernel, grid_of<N>(numel), dim3(kThreads), device.stream, x, y, mask, numel, ranges,
                ChannelDividers(shape));
  });
}

void quantize_any(const void* x, void* y, std::uint8_t* mask, ElementType type, const ChannelShape& shape,
                  const Ranges& ranges, const Device& device) {
  if (shape.numel() == 0) return;
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool aligned = is_aligned(x) && is_aligned(y);
    const auto run = aligned ? quantize<T, kVector<T>> : quantize<T, 1>;
    run(static_cast<const T*>(x), static_cast<T*>(y), mask, shape, ranges, device);
  });
}

}  // namespace

void fake_quantize(const void* x, void* y, ElementType type, ChannelShape shape, const Ranges& ranges,
                   const Device& device) {
  quantize_any(x, y, nullptr, type, shape, ranges, device);
  check_launch("fake_quantize");
}

void fake_quantize_clipped(const void* x, void* y, std::uint8_t* mask, ElementType type, ChannelShape shape,
                           const Ranges& ranges, const Device& device) {
  quantize_any(x, y, mask, type, shape, ranges, device);
  check_launch("fake_quantize_clipped");
}

void fake_quantize_clipped_backward(const void* grad_y, const std::uint8_t* mask, void* grad_x, ElementType type,
                                    std::int64_t numel, const Device& device) {
  if (numel == 0) return;
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int N = kVector<T>;
    const auto* from = static_cast<const T*>(grad_y);
    auto* to = static_cast<T*>(grad_x);
    if (is_aligned(from) && is_aligned(to)) {
      GDFQ_LAUNCH((clipped_backward_kernel<T, N>), grid_of<N>(numel), dim3(kThreads), device.stream, from, mask, to,
                  numel);
    } else {
      GDFQ_LAUNCH((clipped_backward_kernel<T, 1>), grid_of<1>(numel), dim3(kThreads), device.stream, from, mask, to,
                  numel);
    }
  });
  check_launch("fake_quantize_clipped_backward");
}

}  // namespace gdfq::cuda
