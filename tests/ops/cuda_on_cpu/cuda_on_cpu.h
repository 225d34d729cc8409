// Enough of CUDA to run kernels on a CPU, for tests: a fiber per CUDA thread, two blocks at a time,
// whose threads take turns in random order. With an address sanitizer it finds accesses out of
// bounds; with a thread sanitizer, to which the fibers are threads, it finds races in shared and
// global memory.
//
// Only what orders memory on a GPU does so here: __syncthreads, __syncwarp, and the end of a launch.
// Shuffles and votes exchange their values and order nothing else, as CUDA promises no more.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define MOE_CUDA_ON_CPU
#define __global__
#define __device__

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#else  // without it there is nothing to tell
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
constexpr unsigned __tsan_switch_to_fiber_no_sync = 1;
#endif

namespace cuda_on_cpu {

// What fibers read while the scheduler writes it: never a race worth a word.
struct Relaxed {
  std::atomic<uint64_t> value{0};
  operator unsigned() const { return static_cast<unsigned>(value.load(std::memory_order_relaxed)); }
  void operator=(uint64_t v) { value.store(v, std::memory_order_relaxed); }
};
struct Index {
  Relaxed x;
};

enum Wait : uint64_t { kRunnable, kWarp, kExchange, kBlock, kDone };

struct Warp {
  std::atomic<uint64_t> values[32];
  char tag;  // what __syncwarp orders memory by
};

struct Block {
  Block(unsigned number, unsigned threads, size_t shared_bytes)
      : number(number), warps(threads / 32), shared(shared_bytes, char(0xa5)) {}
  unsigned number;
  std::vector<Warp> warps;
  std::vector<char> shared;  // garbage at first, as on a GPU
  char tag;
};

struct Fiber {
  Block* block;
  unsigned thread;
  const std::function<void()>* body;
  ucontext_t context;
  void* sanitizer;
  std::unique_ptr<char[]> stack;
  Relaxed wait;
};

inline std::atomic<Fiber*> current{nullptr};
inline ucontext_t scheduler;
inline void* scheduler_sanitizer = nullptr;
inline char launch_tag;  // what the ends of a launch order memory by

inline Fiber& self() { return *current.load(std::memory_order_relaxed); }
inline Warp& warp() { return self().block->warps[self().thread / 32]; }

inline void leave(Wait wait) {
  Fiber& fiber = self();
  fiber.wait = wait;
  if (wait == kDone) __tsan_release(&launch_tag);
  __tsan_switch_to_fiber(scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
  swapcontext(&fiber.context, &scheduler);
}

inline void run_fiber() {
  __tsan_acquire(&launch_tag);
  (*self().body)();
  leave(kDone);
}

// Lets the threads of some blocks run, each to its next meeting point, until all are done. Those of
// a warp, or of a block, go on when all have come to the same kind of point.
class Scheduler {
 public:
  Scheduler(std::vector<std::unique_ptr<Block>>& blocks, unsigned threads,
            const std::function<void()>& body) : threads_(threads) {
    for (auto& block : blocks) {
      for (unsigned t = 0; t < threads; ++t) start(*block, t, body);
    }
  }
  ~Scheduler() {
    for (auto& fiber : fibers_) __tsan_destroy_fiber(fiber->sanitizer);
  }

  void run(std::mt19937_64& random, Index& thread_index, Index& block_index) {
    while (!runnable_.empty()) {
      std::swap(runnable_[random() % runnable_.size()], runnable_.back());
      const size_t number = runnable_.back();
      runnable_.pop_back();
      Fiber& fiber = *fibers_[number];
      current.store(&fiber, std::memory_order_relaxed);
      thread_index.x = fiber.thread;
      block_index.x = fiber.block->number;
      __tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);
      swapcontext(&scheduler, &fiber.context);
      const size_t in_block = number % threads_;
      if (fiber.wait == kBlock) {
        release(number - in_block, threads_, kBlock);
      } else if (fiber.wait != kDone) {
        release(number - in_block % 32, 32, static_cast<Wait>(unsigned(fiber.wait)));
      }
    }
    for (auto& fiber : fibers_) {
      if (fiber->wait == kDone) continue;
      std::printf("deadlock: thread %u of block %u waits, others never will\n", fiber->thread,
                  fiber->block->number);
      std::exit(1);
    }
    __tsan_acquire(&launch_tag);
  }

 private:
  void start(Block& block, unsigned thread, const std::function<void()>& body) {
    constexpr size_t kStack = 256 << 10;
    auto fiber = std::make_unique<Fiber>();
    fiber->block = &block;
    fiber->thread = thread;
    fiber->body = &body;
    fiber->stack.reset(new char[kStack]);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStack;
    makecontext(&fiber->context, run_fiber, 0);
    fiber->sanitizer = __tsan_create_fiber(0);
    runnable_.push_back(fibers_.size());
    fibers_.push_back(std::move(fiber));
  }

  void release(size_t first, size_t count, Wait wait) {
    for (size_t i = first; i < first + count; ++i) {
      if (fibers_[i]->wait != wait) return;
    }
    for (size_t i = first; i < first + count; ++i) {
      fibers_[i]->wait = kRunnable;
      runnable_.push_back(i);
    }
  }

  unsigned threads_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<size_t> runnable_;
};

// Every lane's value, for every lane.
inline std::vector<uint64_t> exchange(unsigned mask, uint64_t value) {
  if (mask != 0xffffffffu) std::abort();  // the kernels use whole warps only
  warp().values[self().thread % 32].store(value, std::memory_order_relaxed);
  leave(kExchange);
  std::vector<uint64_t> values;
  for (auto& v : warp().values) values.push_back(v.load(std::memory_order_relaxed));
  leave(kExchange);
  return values;
}

template <typename T>
T shuffle(unsigned mask, T value, int source) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits)[source];
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

inline cuda_on_cpu::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() {
  __tsan_release(&cuda_on_cpu::self().block->tag);
  cuda_on_cpu::leave(cuda_on_cpu::kBlock);
  __tsan_acquire(&cuda_on_cpu::self().block->tag);
}
inline void __syncwarp() {
#if !defined(WITHOUT_SYNCWARP)  // to see that the tests would notice
  __tsan_release(&cuda_on_cpu::warp().tag);
  cuda_on_cpu::leave(cuda_on_cpu::kWarp);
  __tsan_acquire(&cuda_on_cpu::warp().tag);
#endif
}
inline int __popc(unsigned bits) { return std::popcount(bits); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_on_cpu::shuffle(mask, value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_on_cpu::shuffle(mask, value, static_cast<int>(threadIdx.x % 32) ^ bits);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return cuda_on_cpu::shuffle(mask, value, lane < delta ? lane : lane - delta);
}
inline unsigned __match_any_sync(unsigned mask, unsigned long long value) {
  const std::vector<uint64_t> values = cuda_on_cpu::exchange(mask, value);
  unsigned peers = 0;
  for (int i = 0; i < 32; ++i) peers |= unsigned(values[i] == value) << i;
  return peers;
}

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half h) { return static_cast<float>(h.value); }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }
inline float __bfloat162float(__nv_bfloat16 b) {
  return std::bit_cast<float>(static_cast<uint32_t>(b.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace cuda_on_cpu {

// kernel<<<blocks, threads, shared_bytes>>>(arguments...)
template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, unsigned blocks, unsigned threads, size_t shared_bytes,
            std::mt19937_64& random, Arguments... arguments) {
  gridDim.x = blocks;
  blockDim.x = threads;
  if (scheduler_sanitizer == nullptr) scheduler_sanitizer = __tsan_get_current_fiber();
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (unsigned first = 0; first < blocks; first += 2) {
    std::vector<std::unique_ptr<Block>> running;
    for (unsigned b = first; b < std::min(first + 2, blocks); ++b) {
      running.push_back(std::make_unique<Block>(order[b], threads, shared_bytes));
    }
    __tsan_release(&launch_tag);
    Scheduler(running, threads, body).run(random, threadIdx, blockIdx);
  }
}

}  // namespace cuda_on_cpu

namespace moe_fast {

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(cuda_on_cpu::self().block->shared.data());
}

}  // namespace moe_fast
