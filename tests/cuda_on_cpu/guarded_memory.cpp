// Memory of tensors between two pages that nobody may touch. A tensor ends where the second page begins, but for the up
// to 15 bytes that keep its beginning aligned; these and the rest of its first page hold a pattern that has to be there
// when the tensor is freed. A tensor itself holds it, too, until it is written: no kernel finds zeros where it forgot
// to write some. Where that is not wanted pages come from the system when they are first written: a tensor of gigabytes
// of which only the ends are touched takes a few kilobytes.
#undef TORCH_TARGET_VERSION  // allocators are not part of the stable ABI
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace {

constexpr std::size_t kAlignment = 16;
constexpr unsigned char kPattern = 0xff;  // as floats: NaN
std::atomic<int> damaged{0};
std::atomic<bool> is_filled{false};

std::size_t round_up(std::size_t size, std::size_t to) { return (size + to - 1) / to * to; }

struct Guarded {
  unsigned char* mapping;
  std::size_t mapped;
  unsigned char* first;  // of the pages that may be touched
  unsigned char* data;
  std::size_t size;

  unsigned char* end() const { return data + round_up(size, kAlignment); }
  // Only the page that `data` is in: those before it hold nothing.
  unsigned char* pattern() const { return std::max(first, data - (data - first) % page()); }

  static std::size_t page() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

  static Guarded* make(std::size_t size) {
    const std::size_t inside = std::max(round_up(size, page()), page());
    const std::size_t mapped = inside + 2 * page();
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* mapping = mmap(nullptr, mapped, PROT_NONE, flags, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    auto* first = static_cast<unsigned char*>(mapping) + page();
    if (mprotect(first, inside, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    auto* memory = new Guarded{static_cast<unsigned char*>(mapping), mapped, first,
                               first + inside - round_up(size, kAlignment), size};
    std::fill(memory->pattern(), memory->data, kPattern);
    std::fill(memory->data + (is_filled ? 0 : size), memory->end(), kPattern);
    return memory;
  }

  static void free(void* context) {
    auto* memory = static_cast<Guarded*>(context);
    const auto is_pattern = [](unsigned char byte) { return byte == kPattern; };
    const bool intact = std::all_of(memory->pattern(), memory->data, is_pattern) &&
                        std::all_of(memory->data + memory->size, memory->end(), is_pattern);
    if (!intact) ++damaged;
    munmap(memory->mapping, memory->mapped);
    delete memory;
  }
};

struct GuardedAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t size) override {
    Guarded* memory = Guarded::make(size);
    return {memory->data, memory, &Guarded::free, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* target, const void* source, std::size_t count) const override {
    std::memcpy(target, source, count);
  }
};

}  // namespace

// From now on CPU tensors are made in guarded memory, filled or not, or as usual. AddressSanitizer guards them to the
// byte itself.
extern "C" __attribute__((visibility("default"))) void gdfq_guard_memory([[maybe_unused]] bool guard,
                                                                         [[maybe_unused]] bool fill) {
#if !defined(__SANITIZE_ADDRESS__)
  static GuardedAllocator guarded;
  is_filled = fill;
  c10::SetCPUAllocator(guard ? &guarded : c10::GetDefaultCPUAllocator(), /*priority=*/255);
#endif
}

// How many tensors that were freed since the last call had been written beside.
extern "C" __attribute__((visibility("default"))) int gdfq_take_damaged() { return damaged.exchange(0); }
