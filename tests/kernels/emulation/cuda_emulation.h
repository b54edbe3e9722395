// Enough of CUDA to run kernels on the CPU: the threads of a block take turns, each until it ends or meets a barrier.
#pragma once

#include <ucontext.h>

#include <functional>
#include <memory>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

namespace emulation {

constexpr size_t kStack = 1 << 17;

class Block {
 public:
  explicit Block(int threads) : threads_(threads), contexts_(threads), done_(threads) {
    for (int i = 0; i < threads; ++i) stacks_.emplace_back(new char[kStack]);
  }
  void run(const std::function<void()>& body) {
    body_ = &body;
    current() = this;
    for (int i = 0; i < threads_; ++i) {
      done_[i] = false;
      getcontext(&contexts_[i]);
      contexts_[i].uc_stack.ss_sp = stacks_[i].get();
      contexts_[i].uc_stack.ss_size = kStack;
      contexts_[i].uc_link = &main_;
      makecontext(&contexts_[i], &Block::start, 0);
    }
    // Whoever is not done has met a barrier: all go on from there together.
    for (bool any = true; any;) {
      any = false;
      for (int i = 0; i < threads_; ++i) {
        if (done_[i]) continue;
        any = true;
        thread_ = i;
        threadIdx.x = static_cast<unsigned>(i);
        swapcontext(&main_, &contexts_[i]);
      }
    }
  }
  void barrier() { swapcontext(&contexts_[thread_], &main_); }
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

 private:
  static void start() {
    Block* block = current();
    (*block->body_)();
    block->done_[block->thread_] = true;
  }
  int threads_, thread_ = 0;
  std::vector<ucontext_t> contexts_;
  std::vector<char> done_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  ucontext_t main_;
  const std::function<void()>* body_ = nullptr;
};

template <class Kernel, class... Args>
void launch(Kernel kernel, int64_t blocks, Args... args) {
  static Block block(COREAI_EMULATED_THREADS);
  const std::function<void()> body = [&] { kernel(args...); };
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(i);
    block.run(body);
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::Block::current()->barrier(); }

#define COREAI_LAUNCH(kernel, blocks, stream, ...) emulation::launch(kernel, blocks, __VA_ARGS__)
