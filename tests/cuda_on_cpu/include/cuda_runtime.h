// In the place of CUDA's header of this name: kernels compiled by a C++ compiler and run on the CPU, one fiber for each
// CUDA thread, blocks one after another in an order that a seed shuffles.
// Supports: threadIdx/blockIdx/..., static __shared__, __syncthreads, warp shuffles with masks.
// Detects: deadlocked and divergent barriers, a shuffle from a lane outside its mask.
// Does not see: races that an order of whole fibers cannot show, such as a missing __threadfence.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(GDFQ_EMU_UCONTEXT) || !defined(__x86_64__)
#define GDFQ_EMU_UC 1
#include <ucontext.h>
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
template <typename T> T shfl(int line, uint32_t mask, T v, int src, int width, bool valid) {
  uint64_t bits = 0; static_assert(sizeof(T) <= 8); std::memcpy(&bits, &v, sizeof(T));
  uint64_t* b = exchange(mask, bits, line);
  if (!valid) return v;
  if (!(mask >> src & 1)) fail("shuffle reads lane " + std::to_string(src) + " which is not in the mask, line " + std::to_string(line));
  T o; std::memcpy(&o, &b[src], sizeof(T)); return o;
}
template <typename T> T shfl_xor(int line, uint32_t m, T v, int x, int w = 32) { int l = cur->lane, s = l ^ x; bool ok = (s / w) <= (l / w); return shfl(line, m, v, ok ? s : l, w, ok); }

inline void entry() {
  blk->body();
  cur->done = true; Block& b = *blk; b.live--;
  if (b.live && b.arrived == b.live) release_block();
  for (;;) to_main();
}
inline unsigned& seed() { static unsigned s = 0; return s; }
inline cudaError_t& last_error() { static cudaError_t e = cudaSuccess; return e; }
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
  if (!b.err.empty()) throw std::runtime_error("cuda_emu: block (" + std::to_string(b.bid.x) + "," + std::to_string(b.bid.y) + "): " + b.err);
}
template <typename F> void launch(dim3 g, dim3 bd, F&& f) {
  const bool fits = g.x && g.y && g.z && g.x < (1u << 31) && g.y < 65536 && g.z < 65536 && bd.x * bd.y * bd.z - 1u < 1024;
  if (!fits) { last_error() = cudaErrorInvalidConfiguration; return; }
  static thread_local Block b; b.grid = g; b.block = bd; b.body = std::forward<F>(f);
  std::vector<unsigned> ord(g.x * g.y * g.z); std::iota(ord.begin(), ord.end(), 0u);
  if (seed()) { std::mt19937 r(seed()); std::shuffle(ord.begin(), ord.end(), r); }
  for (unsigned i : ord) { b.bid = {i % g.x, i / g.x % g.y, i / (g.x * g.y)}; run_block(b); }
}
}  // namespace emu
#define threadIdx (emu::cur->tid)
#define blockIdx (emu::blk->bid)
#define blockDim (emu::blk->block)
#define gridDim (emu::blk->grid)
#define GDFQ_LAUNCH(kern, grid, block, stream, ...) emu::launch((grid), (block), [&] { (kern)(__VA_ARGS__); })
#define __syncthreads() ((void)emu::syncthreads(__LINE__))
#define __shfl_xor_sync(...) emu::shfl_xor(__LINE__, __VA_ARGS__)
inline cudaError_t cudaGetLastError() { const cudaError_t e = emu::last_error(); emu::last_error() = cudaSuccess; return e; }
inline const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "invalid configuration argument"; }
