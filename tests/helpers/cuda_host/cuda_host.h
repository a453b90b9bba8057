// Runs CUDA kernels on the CPU, so that their indices, bounds and barriers are tested where there is no GPU.
//
// Each thread of a block is a fiber that runs until it waits at a barrier or a shuffle, or is done; then comes the next
// one. CUDA_HOST_ORDER says in which order: forward (default), backward or shuffled, blocks likewise. A block finds its
// shared memory full of NaN (all bits set). So a missing barrier gives NaN, or another result in another order.
// Under AddressSanitizer, what is read or written out of bounds is reported, in shared memory too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#undef __shared__
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static  // with red zones around it, which thread_local variables lack
#else
#define __shared__ static thread_local  // only so that fill_static_shared finds all of them
#endif
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_host {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;
inline size_t most_shared = 48 * 1024;  // bytes that the next launch may have

struct Fiber {
  jmp_buf state;  // of a fiber that does not run; unlike swapcontext, a jump makes no system call
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  bool started = false;
  const void* bottom = nullptr;  // of the stack, for AddressSanitizer
  size_t size = 0;
};

enum class State { runs, at_shuffle, at_barrier, done };

struct Thread {
  uint3 index;
  Fiber* fiber;
  State state;
  int line;            // where it waits
  unsigned shuffles;   // so far
  uint64_t offers[2];  // to the other lanes: of this shuffle, and of the last, which slower lanes still read
};

struct Block {
  std::function<void()> kernel;
  std::vector<Thread> threads;
  std::vector<int> order;  // of threads
  size_t started;          // of `order`
  Thread* current;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  Fiber scheduler;
  unsigned char* shared;
};
inline Block block;
inline std::mutex one_launch_at_a_time;
inline std::unique_ptr<std::string> record;  // while there is one, launches are written to it instead of run

__attribute__((noinline)) inline void jump(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, to.bottom, to.size);
#endif
  if (_setjmp(from.state) == 0) {
    if (to.started) _longjmp(to.state, 1);
    to.started = true;
    setcontext(&to.start);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// A fiber starts one thread after another, until one waits: where no thread waits, one fiber serves them all.
inline void run_fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler.bottom, &block.scheduler.size);
#endif
  for (;;) {
    Fiber* const self = block.idle.back();
    block.idle.pop_back();
    while (block.started < block.order.size()) {
      block.current = &block.threads[block.order[block.started++]];
      block.current->fiber = self;
      threadIdx = block.current->index;
      block.kernel();
      block.current->state = State::done;
    }
    block.idle.push_back(self);
    jump(*self, block.scheduler);
  }
}

inline Fiber& idle_fiber() {
  if (block.idle.empty()) {
    block.fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *block.fibers.back();
    fiber.stack.reset(new char[kStackBytes]);
    fiber.bottom = fiber.stack.get();
    fiber.size = kStackBytes;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, run_fiber, 0);
    block.idle.push_back(&fiber);
  }
  return *block.idle.back();
}

inline void wait(State state, int line) {
  Thread& self = *block.current;
  self.state = state;
  self.line = line;
  jump(*self.fiber, block.scheduler);
}

// Lets threads [first, end) go on if all of them wait, at one place.
inline bool release(size_t first, size_t end, State state) {
  const auto begin = block.threads.begin();
  const bool together = std::all_of(begin + first, begin + end, [&](const Thread& thread) {
    return thread.state == state && thread.line == block.threads[first].line;
  });
  for (size_t i = first; together && i < end; ++i) block.threads[i].state = State::runs;
  return together;
}

template <typename T>
void put_in_order(std::vector<T>& numbers) {
  static std::mt19937 generator(0);
  const char* const variable = std::getenv("CUDA_HOST_ORDER");
  const std::string order = variable ? variable : "forward";
  std::iota(numbers.begin(), numbers.end(), T(0));
  if (order == "backward") {
    std::reverse(numbers.begin(), numbers.end());
  } else if (order == "shuffled") {
    std::shuffle(numbers.begin(), numbers.end(), generator);
  } else if (order != "forward") {
    throw std::runtime_error("CUDA_HOST_ORDER is " + order + ", expected forward, backward or shuffled");
  }
}

inline void run_block(const std::string& name) {
  const size_t count = block.threads.size();
  for (auto& thread : block.threads) thread.state = State::runs, thread.shuffles = 0;
  put_in_order(block.order);
  block.started = 0;
  block.scheduler.started = true;  // it is the thread we are in
  while (block.started < count) jump(block.scheduler, idle_fiber());
  for (;;) {
    const auto is_done = [](const Thread& thread) { return thread.state == State::done; };
    if (std::all_of(block.threads.begin(), block.threads.end(), is_done)) return;
    bool released = release(0, count, State::at_barrier);
    for (size_t i = 0; i < count; i += kWarp) {
      released |= release(i, std::min(i + kWarp, count), State::at_shuffle);
    }
    if (!released) {
      block.fibers.clear();  // threads that wait for ever
      block.idle.clear();
      throw std::runtime_error(name + ": threads wait at different barriers, or some left before one");
    }
    put_in_order(block.order);
    for (const int i : block.order) {
      if (block.threads[i].state != State::runs) continue;
      block.current = &block.threads[i];
      threadIdx = block.current->index;
      jump(block.scheduler, *block.current->fiber);
    }
  }
}

// All __shared__ variables are this library's thread-local memory.
inline void fill_static_shared() {
#ifndef __SANITIZE_ADDRESS__
  [[maybe_unused]] static thread_local volatile char anchor;
  anchor = 0;  // the memory is there from its first use on
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* code) {
        const ElfW(Phdr)* tls = nullptr;
        bool is_this = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr) & segment = info->dlpi_phdr[i];
          const auto offset = reinterpret_cast<uintptr_t>(code) - info->dlpi_addr - segment.p_vaddr;
          is_this |= segment.p_type == PT_LOAD && offset < segment.p_memsz;
          if (segment.p_type == PT_TLS) tls = &segment;
        }
        if (is_this) std::memset(info->dlpi_tls_data, 0xff, tls->p_memsz);
        return static_cast<int>(is_this);
      },
      reinterpret_cast<void*>(&run_block));
#endif
}

template <typename... Parameters, typename... Arguments>
void launch(const std::string& name, dim3 grid, dim3 threads, size_t shared_bytes, void (*kernel)(Parameters...),
            Arguments... arguments) {
  const std::lock_guard lock(one_launch_at_a_time);
  const size_t count = size_t(threads.x) * threads.y * threads.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (count == 0 || count > 1024 || threads.z > 64 || shared_bytes > most_shared || blocks == 0 || grid.x > INT32_MAX ||
      grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error(name + ": invalid configuration argument");
  }
  if (record) {
    *record +=
        name + " " + std::to_string(blocks) + " " + std::to_string(count) + " " + std::to_string(shared_bytes) + "\n";
    return;
  }
  gridDim = grid;
  blockDim = threads;
  block.kernel = [&] { kernel(arguments...); };
  block.threads.resize(count);
  block.order.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    block.threads[i].index = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
  }
  const std::unique_ptr<unsigned char[]> shared(new unsigned char[shared_bytes]);
  block.shared = shared.get();
  std::vector<size_t> order(blocks);
  put_in_order(order);
  for (const size_t i : order) {
    blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    std::memset(shared.get(), 0xff, shared_bytes);
    fill_static_shared();
    run_block(name);
  }
}

// What lane source(lane) offers; a lane's own value where there is no such lane.
template <typename T, typename Source>
T shuffle(unsigned mask, T value, Source source, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Thread& self = *block.current;
  if (mask != 0xffffffff) {  // nothing can be thrown out of a fiber
    std::fputs("cuda_host: a shuffle of some lanes only is not supported\n", stderr);
    std::abort();
  }
  const unsigned which = self.shuffles++ % 2;
  std::memcpy(&self.offers[which], &value, sizeof(T));
  wait(State::at_shuffle, line);
  const size_t number = &self - block.threads.data(), lane = number % kWarp, other = source(lane);
  if (other < kWarp && number - lane + other < block.threads.size()) {
    std::memcpy(&value, &block.threads[number - lane + other].offers[which], sizeof(T));
  }
  return value;
}

// Calls use(array of what the lanes of the warp have); none goes on before all have done.
template <typename T, typename Use>
void with_warp(const T& own, Use use, int line) {
  Thread& self = *block.current;
  const size_t first = (&self - block.threads.data()) / kWarp * kWarp;
  const unsigned which = self.shuffles++ % 2;
  const T* const address = &own;
  std::memcpy(&self.offers[which], &address, sizeof(address));
  wait(State::at_shuffle, line);
  const T* lanes[kWarp];
  for (size_t lane = 0; lane < kWarp; ++lane) {
    std::memcpy(&lanes[lane], &block.threads[first + lane].offers[which], sizeof(T*));
  }
  use(lanes);
  shuffle(0xffffffff, 0, [](size_t lane) { return lane; }, -line);
}

template <typename T>
float from_bits(uint16_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(value));
  return static_cast<float>(value);
}

// fma.rn.f16x2
inline uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int half = 0; half < 32; half += 16) {
    const double sum =
        double(from_bits<__half>(a >> half)) * from_bits<__half>(b >> half) + from_bits<__half>(c >> half);
    const __half rounded = __double2half(sum);
    uint16_t bits;
    std::memcpy(&bits, &rounded, sizeof(bits));
    result |= uint32_t(bits) << half;
  }
  return result;
}

// mma.sync m16n8k16 and m16n8k8 with float32 sums: products are exact, and rounded once they are added up.
template <typename T, int kInputs>
void multiply_add(float (&first)[2], float (&second)[2], const uint32_t (&a)[kInputs / 4],
                  const uint32_t (&b)[kInputs / 8], const float (&first_start)[2], const float (&second_start)[2],
                  int line = __builtin_LINE()) {
  struct Operands {
    const uint32_t *a, *b;
  };
  with_warp(
      Operands{a, b},
      [&](const Operands* const* lanes) {
        const size_t lane = (block.current - block.threads.data()) % kWarp, group = lane / 4, pair = lane % 4;
        for (int row = 0; row < 2; ++row) {
          for (int column = 0; column < 2; ++column) {
            float& to = row ? second[column] : first[column];
            double sum = row ? second_start[column] : first_start[column];
            for (int k = 0; k < kInputs; ++k) {
              const int word = k / 8, quarter = k % 8 / 2, half = 16 * (k % 2);
              const uint32_t left = lanes[4 * group + quarter]->a[2 * word + row];
              const uint32_t right = lanes[4 * (2 * pair + column) + quarter]->b[word];
              sum += double(from_bits<T>(left >> half)) * from_bits<T>(right >> half);
            }
            to = static_cast<float>(sum);
          }
        }
      },
      line);
}

// ldmatrix.x4: lanes 8 i to 8 i + 7 have the addresses of the rows of matrix i.
inline void read_matrices(const std::array<uint32_t*, 4>& to, const uint32_t* row, int line = __builtin_LINE()) {
  with_warp(
      row,
      [&](const uint32_t* const* const* lanes) {
        const size_t lane = (block.current - block.threads.data()) % kWarp;
        for (size_t i = 0; i < to.size(); ++i) *to[i] = (*lanes[8 * i + lane / 4])[lane % 4];
      },
      line);
}

}  // namespace cuda_host

inline void __syncthreads(int line = __builtin_LINE()) { cuda_host::wait(cuda_host::State::at_barrier, line); }

inline void __syncwarp(unsigned mask = 0xffffffff, int line = __builtin_LINE()) {
  cuda_host::shuffle(mask, 0, [](size_t lane) { return lane; }, line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  return cuda_host::shuffle(mask, value, [delta](size_t lane) { return lane + delta; }, line);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return cuda_host::shuffle(mask, value, [lanes](size_t lane) { return lane ^ lanes; }, line);
}

inline int multiprocessors() {
  const char* const variable = std::getenv("CUDA_HOST_MULTIPROCESSORS");
  return variable ? std::atoi(variable) : 132;
}

inline int shared_kilobytes(const char* variable, int otherwise) {
  const char* const value = std::getenv(variable);
  return (value ? std::atoi(value) : otherwise) * 1024;
}

inline int most_shared_bytes() { return shared_kilobytes("CUDA_HOST_SHARED", 228) - 1024; }
inline int shared_bytes_of_multiprocessor() { return shared_kilobytes("CUDA_HOST_SHARED", 228); }

template <typename Kernel>
void allow_shared(Kernel*, int64_t bytes, const char* name) {
  if (bytes > most_shared_bytes()) throw std::runtime_error(std::string(name) + ": invalid argument");
  cuda_host::most_shared = std::max<size_t>(bytes, 48 * 1024);
}

inline void copy_async(void* to, const void* from, int64_t bytes, void*) { std::memcpy(to, from, bytes); }

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), cuda_host::launch(#kernel, (grid), (block), (shared_bytes), (kernel), ##__VA_ARGS__))

#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(cuda_host::block.shared)
