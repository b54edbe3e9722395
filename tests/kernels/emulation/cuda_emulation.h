// Enough of CUDA to run kernels on the CPU: the threads of a block take turns, each until it ends or has to wait for
// others. Who waits goes on when all whom it waits for have come: the block's threads, the warp's, or the grid's. Blocks
// come one after the other; those of a grid that is started as a whole take turns, too, and each is a thread of the CPU's.
#pragma once

#include <dlfcn.h>
#include <ucontext.h>

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // one block at a time in each of the CPU's threads

struct Index {
  unsigned x = 0;
};
inline thread_local Index threadIdx, blockIdx, gridDim;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

namespace emulation {

constexpr size_t kStack = 1 << 17;
constexpr int kWarp = 32;

class Block {
 public:
  // `wait_for_grid`: what all threads of the block do together when they wait for the grid's; none: they never do.
  explicit Block(int threads, std::function<void()> wait_for_grid = {})
      : threads_(threads), contexts_(threads), state_(threads), slots_(threads), wait_for_grid_(std::move(wait_for_grid)) {
    for (int i = 0; i < threads; ++i) stacks_.emplace_back(new char[kStack]);
  }
  // `backwards`: the threads' turns come in the other order.
  void run(const std::function<void()>& body, bool backwards) {
    body_ = &body;
    current() = this;
    for (int i = 0; i < threads_; ++i) {
      state_[i] = kReady;
      getcontext(&contexts_[i]);
      contexts_[i].uc_stack.ss_sp = stacks_[i].get();
      contexts_[i].uc_stack.ss_size = kStack;
      contexts_[i].uc_link = &main_;
      makecontext(&contexts_[i], &Block::start, 0);
    }
    int done = 0;
    while (done < threads_) {
      bool ran = false;
      for (int turn = 0; turn < threads_; ++turn) {
        const int i = backwards ? threads_ - 1 - turn : turn;
        if (state_[i] != kReady) continue;
        ran = true;
        thread_ = i;
        threadIdx.x = static_cast<unsigned>(i);
        swapcontext(&main_, &contexts_[i]);
        done += state_[i] == kDone;
      }
      for (int first = 0; first < threads_; first += kWarp) release(first, first + kWarp, kAtWarp);
      release(0, threads_, kAtBlock);
      if (all_wait_for_grid()) {
        if (!wait_for_grid_) fail("blocks wait for each other that need not be there at the same time");
        wait_for_grid_();
        release(0, threads_, kAtGrid);
        continue;
      }
      if (!ran && done < threads_) {
        fail("the threads of a block wait for each other");
      }
    }
  }
  void wait_for_block() { wait(kAtBlock); }
  void wait_for_warp() { wait(kAtWarp); }
  void wait_for_grid() { wait(kAtGrid); }
  // What lane `lane` of the warp has come with.
  uint32_t exchange(uint32_t value, int lane) {
    slots_[thread_] = value;
    wait_for_warp();
    const uint32_t found = slots_[thread_ / kWarp * kWarp + lane % kWarp];
    wait_for_warp();
    return found;
  }
  int lane() const { return thread_ % kWarp; }
  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }
  [[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "%s\n", what);
    abort();
  }

 private:
  enum State : char { kReady, kAtWarp, kAtBlock, kAtGrid, kDone };
  void wait(State state) {
    const int own = thread_;
    state_[own] = state;
    swapcontext(&contexts_[own], &main_);
  }
  // Those of [begin, end) who wait at such a place go on if nobody is missing. Who has ended is not.
  void release(int begin, int end, State place) {
    for (int i = begin; i < end; ++i) {
      if (state_[i] != place && state_[i] != kDone) return;
    }
    for (int i = begin; i < end; ++i) {
      if (state_[i] == place) state_[i] = kReady;
    }
  }
  bool all_wait_for_grid() const {
    bool any = false;
    for (const State state : state_) {
      if (state != kAtGrid && state != kDone) return false;
      any = any || state == kAtGrid;
    }
    return any;
  }
  static void start() {
    Block* block = current();
    (*block->body_)();
    block->state_[block->thread_] = kDone;
  }
  int threads_, thread_ = 0;
  std::vector<ucontext_t> contexts_;
  std::vector<State> state_;
  std::vector<uint32_t> slots_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  ucontext_t main_;
  const std::function<void()>* body_ = nullptr;
  std::function<void()> wait_for_grid_;
};

// What the emulated GPU says of grids that are started as a whole: blocks that its multiprocessor holds, 0 if it starts
// none; and those that it then takes.
inline int promised_blocks = 8, taken_blocks = 8;
inline int64_t launches = 0, whole_grids = 0;  // so far

// Blocks and threads come in order, or all the other way round: what depends on their order shows.
inline bool backwards = false;

// Blocks that are there at the same time. One of them runs, until it ends or has to wait for the others.
class Grid {
 public:
  explicit Grid(int64_t blocks) : state_(static_cast<size_t>(blocks), kReady) {}

  void run(const std::function<void()>& body) {
    const size_t blocks = state_.size();
    std::vector<std::thread> threads;
    for (size_t i = 0; i < blocks; ++i) {
      threads.emplace_back([this, i, &body] {
        give_way(i);
        gridDim.x = static_cast<unsigned>(state_.size());
        blockIdx.x = static_cast<unsigned>(i);
        Block block(COREAI_EMULATED_THREADS, [this, i] {
          state_[i] = kWaits;
          give_way(i);
        });
        block.run(body, backwards);
        state_[i] = kDone;
        give_turn(kNobody);
      });
    }
    for (size_t done = 0; done < blocks;) {
      done = 0;
      for (size_t turn = 0; turn < blocks; ++turn) {
        const size_t i = backwards ? blocks - 1 - turn : turn;
        give_turn(i);
        wait_for_turn(kNobody);
        done += state_[i] == kDone;
      }
      if (done != 0 && done != blocks) Block::fail("a block ends that others wait for");
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  enum State : char { kReady, kWaits, kDone };
  static constexpr size_t kNobody = SIZE_MAX;

  void give_turn(size_t to) {
    const std::lock_guard<std::mutex> lock(mutex_);
    turn_ = to;
    changed_.notify_all();
  }
  void wait_for_turn(size_t of) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return turn_ == of; });
  }
  void give_way(size_t own) {
    if (state_[own] == kWaits) give_turn(kNobody);
    wait_for_turn(own);
  }

  std::vector<State> state_;
  size_t turn_ = kNobody;
  std::mutex mutex_;
  std::condition_variable changed_;
};

#if defined(COREAI_RECORDED)
// Kernels are not run, but told: what they are given, one by one, then a kernel's name and its blocks. So is memory that
// is allocated for them. Where nobody listens, nothing is done. (The name is how symbols are looked up; a GPU's code has the
// same.)
inline void (*tell_argument)(const void* data, int64_t size) = nullptr;
inline void (*tell_launch)(const char* name, int64_t blocks, bool is_whole) = nullptr;
inline void (*tell_memory)(const void* data, int64_t size) = nullptr;

template <class... Parameters, class... Args>
void record(bool is_whole, void (*kernel)(Parameters...), int64_t blocks, const Args&... args) {
  if (tell_launch == nullptr) return;
  const auto tell = [](const auto& value) { tell_argument(&value, sizeof(value)); };
  (tell(static_cast<Parameters>(args)), ...);
  Dl_info info = {};
  if (dladdr(reinterpret_cast<void*>(kernel), &info) == 0 || info.dli_sname == nullptr) abort();
  tell_launch(info.dli_sname, blocks, is_whole);
}
template <class Kernel, class... Args>
void launch(Kernel* kernel, int64_t blocks, const Args&... args) {
  record(false, kernel, blocks, args...);
}
template <class Kernel, class Job>
void launch_whole(Kernel* kernel, int64_t blocks, const Job& job) {
  record(true, kernel, blocks, job);
}
#else
template <class Kernel, class... Args>
void launch(Kernel kernel, int64_t blocks, Args... args) {
  ++launches;
  static Block block(COREAI_EMULATED_THREADS);
  const std::function<void()> body = [&] { kernel(args...); };
  gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(backwards ? blocks - 1 - i : i);
    block.run(body, backwards);
  }
}
template <class Kernel, class Job>
void launch_whole(Kernel kernel, int64_t blocks, const Job& job) {
  ++launches, ++whole_grids;
  Grid(blocks).run([&] { kernel(job); });
}
#endif

inline float from_bits(uint32_t bits) {
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

inline uint32_t to_bits(float x) {
  uint32_t result;
  memcpy(&result, &x, sizeof(result));
  return result;
}

// Conversions of 16-bit types. As the hardware's, NaN becomes one of all ones.
inline float from_half(uint16_t word) {
  const uint32_t sign = static_cast<uint32_t>(word & 0x8000) << 16, magnitude = static_cast<uint32_t>(word & 0x7fff) << 13;
  if (magnitude >= 0x0f800000) return from_bits(sign | magnitude | 0x7f800000);
  return from_bits(sign | to_bits(from_bits(magnitude) * 0x1p112f));
}

inline uint16_t to_half(float x) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // an addition rounds at the quantum of subnormals
    return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f)));
  }
  return static_cast<uint16_t>(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = to_bits(x);
  return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulation

inline void __syncthreads() { emulation::Block::current()->wait_for_block(); }
inline void __syncwarp(uint32_t = 0xffffffffu) { emulation::Block::current()->wait_for_warp(); }

template <class T>
T __shfl_sync(uint32_t, T value, int lane) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  bits = emulation::Block::current()->exchange(bits, lane);
  memcpy(&value, &bits, sizeof(bits));
  return value;
}

template <class T>
T __shfl_xor_sync(uint32_t all, T value, int mask) {
  return __shfl_sync(all, value, emulation::Block::current()->lane() ^ mask);
}

// What all lanes of the warp have come with, folded: into each lane's own, so that all come to the same.
template <class Fold>
uint32_t fold_warp(uint32_t value, Fold fold) {
  uint32_t result = value;
  for (int lane = 0; lane < emulation::kWarp; ++lane) result = fold(result, __shfl_sync(0xffffffffu, value, lane));
  return result;
}

inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  return fold_warp(value, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}

inline bool __any_sync(uint32_t, bool value) {
  return fold_warp(value, [](uint32_t a, uint32_t b) { return a | b; }) != 0;
}

#if defined(COREAI_EMULATED_DEVICES)
extern "C" {  // of gpu.cpp
int32_t gpu_exchange_device(int32_t device);
int64_t gpu_stream(int32_t device);
void gpu_launched(int64_t stream);
}
#define COREAI_LAUNCHED(stream) gpu_launched(stream)
#else
#define COREAI_LAUNCHED(stream) static_cast<void>(stream)
#endif
#define COREAI_LAUNCH(kernel, blocks, threads, stream, ...) \
  (COREAI_LAUNCHED(stream), emulation::launch(kernel, blocks, __VA_ARGS__))

namespace coreai::cuda {

// As in cuda/grid.cuh.
inline void sync_grid() { emulation::Block::current()->wait_for_grid(); }

template <class Job>
int64_t blocks_at_once(void (*)(Job), int, int32_t) {
  return emulation::promised_blocks;
}

template <class Job>
bool launch_at_once(void (*kernel)(Job), int64_t blocks, int, int stream, Job job) {
  if (blocks > emulation::taken_blocks) return false;
  COREAI_LAUNCHED(stream);
  emulation::launch_whole(kernel, blocks, job);
  return true;
}

}  // namespace coreai::cuda
