// In the place of CUDA's header of this name: kernels compiled by a C++ compiler and run on the CPU, one fiber for each
// CUDA thread, blocks one after another in an order that a seed shuffles.
// Supports: threadIdx/blockIdx/..., static __shared__, __syncthreads, warp shuffles with masks.
// Detects: deadlocked and divergent barriers, a shuffle from a lane outside its mask, a launch on another stream than the
// call's, a grid or a block beyond the hardware's limits, blocks that do the same work twice. A fault in a kernel (memory
// that is not mapped, see guarded_memory.cpp; or what -fsanitize=undefined traps, such as a 16-byte load of data that is
// not aligned) is an error that names the launch, the block and the thread.
// Does not see: races that an order of whole fibers cannot show, such as a missing __threadfence.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <csignal>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#include <ucontext.h>
#if defined(GDFQ_EMU_UCONTEXT) || !defined(__x86_64__)
#define GDFQ_EMU_UC 1
#endif
#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
struct dim3 { unsigned x, y, z; constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
struct uint3 { unsigned x, y, z; };

#ifndef GDFQ_EMU_UC
asm(R"(
.text
.weak gdfq_emu_swap
.type gdfq_emu_swap,@function
gdfq_emu_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gdfq_emu_swap,.-gdfq_emu_swap
)");
extern "C" void gdfq_emu_swap(void** save, void* to);
#endif

namespace emu {
constexpr size_t kStack = 64 * 1024;
struct Rv { uint32_t mask = 0, arrived = 0, gen = 0; uint64_t slot[2][32]; };
struct Warp { std::vector<Rv> rv; Rv& get(uint32_t m) { for (auto& r : rv) if (r.mask == m) return r; rv.reserve(64); rv.emplace_back(); rv.back().mask = m; return rv.back(); } };
struct Thread {
  uint3 tid; unsigned lin, lane; Warp* warp; bool done; const uint32_t* wptr; uint32_t wval; const char* where; int line;
#ifdef GDFQ_EMU_UC
  ucontext_t ctx;
#else
  void* sp;
#endif
};
struct Block {
  const char* kernel;
  bool read[3];  // which coordinates of blockIdx a thread has looked at
  dim3 grid, block; uint3 bid; std::vector<Thread> th; std::vector<Warp> warps; std::vector<char> stacks;
  unsigned live = 0, arrived = 0; uint32_t gen = 0; int bar_line = 0; int acc = 0, acc_out[2] = {0, 0};
  uint64_t switches = 0;
  std::function<void()> body; std::string err;
#ifdef GDFQ_EMU_UC
  ucontext_t main;
#else
  void* main_sp;
#endif
};
inline thread_local Thread* cur = nullptr;
inline thread_local Block* blk = nullptr;
inline void to_main() {
#ifdef GDFQ_EMU_UC
  swapcontext(&cur->ctx, &blk->main);
#else
  gdfq_emu_swap(&cur->sp, blk->main_sp);
#endif
}
inline void wait(const uint32_t* p, uint32_t v, const char* what, int line) {
  cur->wptr = p; cur->wval = v; cur->where = what; cur->line = line;
  while (*p == v) to_main();
  cur->wptr = nullptr;
}
inline void fail(const std::string& m) { if (blk->err.empty()) blk->err = m; for (;;) { cur->done = true; to_main(); } }
inline void release_block() { blk->arrived = 0; blk->bar_line = 0; blk->acc_out[blk->gen & 1] = blk->acc; blk->acc = 0; blk->gen++; }
inline int syncthreads(int line, int pred = 0) {
  Block& b = *blk;
  if (b.arrived && b.bar_line != line) fail("threads of one block wait at different barriers: lines " + std::to_string(b.bar_line) + " and " + std::to_string(line));
  b.bar_line = line; b.acc += pred != 0; uint32_t g = b.gen;
  if (++b.arrived == b.live) release_block(); else wait(&b.gen, g, "__syncthreads", line);
  return b.acc_out[g & 1];
}
inline uint64_t* exchange(uint32_t mask, uint64_t v, int line) {
  if (!(mask >> cur->lane & 1)) fail("shuffle/vote by a lane outside its own mask, line " + std::to_string(line));
  Rv& r = cur->warp->get(mask); uint32_t g = r.gen; uint64_t* buf = r.slot[g & 1];
  buf[cur->lane] = v; r.arrived |= 1u << cur->lane;
  if (r.arrived == mask) { r.arrived = 0; r.gen++; } else wait(&r.gen, g, "warp op", line);
  return buf;
}
template <typename T> T shfl(int line, uint32_t mask, T v, int src, bool valid) {
  uint64_t bits = 0; static_assert(sizeof(T) <= 8); std::memcpy(&bits, &v, sizeof(T));
  uint64_t* b = exchange(mask, bits, line);
  if (!valid) return v;
  if (!(mask >> src & 1)) fail("shuffle reads lane " + std::to_string(src) + " which is not in the mask, line " + std::to_string(line));
  T o; std::memcpy(&o, &b[src], sizeof(T)); return o;
}
template <typename T> T shfl_xor(int line, uint32_t m, T v, int x, int w = 32) { int l = cur->lane, s = l ^ x; bool ok = (s / w) <= (l / w); return shfl(line, m, v, ok ? s : l, ok); }

inline void entry() {
  blk->body();
  cur->done = true; Block& b = *blk; b.live--;
  if (b.live && b.arrived == b.live) release_block();
  for (;;) to_main();
}
inline unsigned& seed() { static unsigned s = 0; return s; }
// The stream of the call that is made; the address alone counts.
inline cudaStream_t call_stream() { static char stream; return &stream; }
// Of a longer grid only so many blocks run, half of them at the beginning and half at the end: enough to see where the
// ends of a tensor are that no test could afford to fill.
inline unsigned& most_blocks() { static unsigned most = ~0u; return most; }

// What was launched since it was last asked for.
struct Launched { std::uint64_t kernels = 0, blocks = 0, threads = 0; };
inline Launched& launched() { static Launched count; return count; }

// A coordinate of blockIdx.
template <int axis> struct Coordinate {
  operator unsigned() const { blk->read[axis] = true; return axis == 0 ? blk->bid.x : axis == 1 ? blk->bid.y : blk->bid.z; }
};
struct BlockIndex { Coordinate<0> x; Coordinate<1> y; Coordinate<2> z; };

// A fault in a kernel ends its block with an error, as on a device; outside of kernels it is nobody's business here.
class FaultHandler {
 public:
#if defined(__x86_64__) && !defined(GDFQ_EMU_UC) && !defined(__SANITIZE_ADDRESS__)
  FaultHandler() {
    static thread_local std::vector<char> stack(64 * 1024);
    stack_t alternative{}; alternative.ss_sp = stack.data(); alternative.ss_size = stack.size();
    sigaltstack(&alternative, &stack_);
    struct sigaction action{}; action.sa_sigaction = &handle; action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~FaultHandler() {
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &before_[i], nullptr);
    sigaltstack(&stack_, nullptr);
  }
  FaultHandler(const FaultHandler&) = delete;

 private:
  static constexpr int kSignals[3] = {SIGSEGV, SIGBUS, SIGILL};
  struct sigaction before_[3];
  stack_t stack_;

  static void handle(int signal, siginfo_t*, void* context) {
    if (cur == nullptr) { std::signal(signal, SIG_DFL); return; }
    illegal() = signal == SIGILL;
    auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    registers[REG_RSP] = ((registers[REG_RSP] - 512) & ~15LL) - 8;  // below what the thread keeps there, as after a call
    registers[REG_RIP] = reinterpret_cast<greg_t>(&landing);
  }
  static bool& illegal() { static thread_local bool value; return value; }
  static void landing() {
    fail("thread " + std::to_string(cur->lin) + (illegal() ? " does something undefined: an unaligned vector, an index "
         "outside of its array, an overflow" : " touches memory outside of what was allocated"));
  }
#endif
};

inline cudaError_t& last_error() { static cudaError_t e = cudaSuccess; return e; }
[[noreturn]] inline void refuse(const char* kernel, const std::string& why) {
  throw std::runtime_error(std::string("cuda_emu: ") + kernel + ": " + why);
}
inline void run_block(Block& b) {
  const unsigned n = b.block.x * b.block.y * b.block.z;
  if (b.stacks.size() < n * kStack) b.stacks.resize(n * kStack);
  b.th.assign(n, Thread{}); b.warps.assign((n + 31) / 32, Warp{});
  b.live = n; b.arrived = 0; b.gen = 0; b.bar_line = 0; b.acc = 0; b.err.clear();
  for (unsigned i = 0; i < n; ++i) {
    Thread& t = b.th[i]; t.lin = i; t.lane = i % 32; t.warp = &b.warps[i / 32];
    t.tid = {i % b.block.x, i / b.block.x % b.block.y, i / (b.block.x * b.block.y)};
    char* stk = b.stacks.data() + i * kStack;
#ifdef GDFQ_EMU_UC
    getcontext(&t.ctx); t.ctx.uc_stack.ss_sp = stk; t.ctx.uc_stack.ss_size = kStack; t.ctx.uc_link = nullptr; makecontext(&t.ctx, entry, 0);
#else
    uintptr_t top = (uintptr_t(stk) + kStack) & ~uintptr_t(15);
    void** s = reinterpret_cast<void**>(top); *--s = nullptr; *--s = reinterpret_cast<void*>(&entry); for (int k = 0; k < 6; ++k) *--s = nullptr;
    t.sp = s;
#endif
  }
  std::vector<unsigned> ord(n); std::iota(ord.begin(), ord.end(), 0u);
  std::mt19937 rng(seed() * 7919u + b.bid.x * 31u + b.bid.y);
  const unsigned slow = rng() % b.warps.size();
  Block* saved = blk; blk = &b;
  while (b.live && b.err.empty()) {
    if (seed()) std::shuffle(ord.begin(), ord.end(), rng);
    bool ran = false;
    // One warp runs only while no other can: what it has not read yet is overwritten where a barrier is missing.
    for (int turn = 0; turn < 2 && !ran; ++turn) for (unsigned i : ord) {
      Thread& t = b.th[i];
      if (t.done || (t.wptr && *t.wptr == t.wval)) continue;
      if (seed() && turn == 0 && i / 32 == slow) continue;
      ran = true; cur = &t; b.switches++;
#ifdef GDFQ_EMU_UC
      swapcontext(&b.main, &t.ctx);
#else
      gdfq_emu_swap(&b.main_sp, t.sp);
#endif
      if (!b.err.empty()) break;
    }
    if (!ran && b.err.empty()) {
      for (auto& t : b.th) if (!t.done) { b.err = std::string("deadlock: thread ") + std::to_string(t.lin) + " waits in " + t.where + " at line " + std::to_string(t.line) + " and the rest cannot arrive"; break; }
    }
  }
  cur = nullptr; blk = saved;
  if (!b.err.empty()) refuse(b.kernel, "block (" + std::to_string(b.bid.x) + "," + std::to_string(b.bid.y) + "): " + b.err);
}
template <typename F> void launch(const char* kernel, dim3 g, dim3 bd, cudaStream_t stream, F&& f) {
  if (stream != call_stream()) refuse(kernel, "launched on another stream than the call's");
  const bool fits = g.x && g.y && g.z && g.x < (1u << 31) && g.y < 65536 && g.z < 65536 && bd.x && bd.y && bd.z &&
                    bd.x <= 1024 && bd.y <= 1024 && bd.z <= 64 && std::uint64_t{bd.x} * bd.y * bd.z <= 1024;
  if (!fits) { last_error() = cudaErrorInvalidConfiguration; return; }
  static thread_local Block b; b.kernel = kernel; b.grid = g; b.block = bd; b.body = std::forward<F>(f);
  b.read[0] = b.read[1] = b.read[2] = false;
  const std::uint64_t blocks = std::uint64_t{g.x} * g.y * g.z, most = std::min<std::uint64_t>(blocks, most_blocks());
  launched() = {launched().kernels + 1, launched().blocks + blocks, launched().threads + blocks * bd.x * bd.y * bd.z};
  std::vector<std::uint64_t> ord(most);
  std::iota(ord.begin(), ord.begin() + most / 2, std::uint64_t{0});
  std::iota(ord.begin() + most / 2, ord.end(), blocks - (most - most / 2));
  if (seed()) { std::mt19937 r(seed()); std::shuffle(ord.begin(), ord.end(), r); }
  const FaultHandler handler;
  for (std::uint64_t i : ord) { b.bid = {unsigned(i % g.x), unsigned(i / g.x % g.y), unsigned(i / g.x / g.y)}; run_block(b); }
  const unsigned size[3] = {g.x, g.y, g.z};
  for (int axis = 0; axis < 3; ++axis)
    if (size[axis] > 1 && !b.read[axis]) refuse(kernel, std::string("its blocks do not look at blockIdx.") + "xyz"[axis] + ", so all of them do the same");
}
}  // namespace emu
#define threadIdx (emu::cur->tid)
#define blockIdx (emu::BlockIndex{})
#define blockDim (emu::blk->block)
#define gridDim (emu::blk->grid)
#define GDFQ_LAUNCH(kern, grid, block, stream, ...) emu::launch(#kern, (grid), (block), (stream), [&] { (kern)(__VA_ARGS__); })
#define __syncthreads() ((void)emu::syncthreads(__LINE__))
#define __shfl_xor_sync(...) emu::shfl_xor(__LINE__, __VA_ARGS__)
inline cudaError_t cudaGetLastError() { const cudaError_t e = emu::last_error(); emu::last_error() = cudaSuccess; return e; }
inline const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "invalid configuration argument"; }
