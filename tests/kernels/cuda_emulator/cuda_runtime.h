// Runs CUDA kernels on a CPU, for tests: slow, exact, and strict.
//
// The threads of a block are fibres on one system thread. A fibre runs until it waits for its block or its warp; when
// all of them wait and none can go on, the launch fails instead of hanging. Blocks run one after the other, so shared
// memory is static memory. Warps run ahead of each other as far as barriers let them, in rising or falling order, and so
// do blocks (ef_emulator_order): a kernel that lacks a barrier, or depends on the order of its blocks, gives other
// results.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__ static
#define __restrict__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum class State { kReady, kAtBlock, kAtWarp, kDone };

// Started by ucontext, switched by setjmp: swapcontext enters the system each time.
struct Fibre {
  jmp_buf here;
  bool started = false;
  State state = State::kDone;
  dim3 index;
  std::vector<char> stack;
};

struct Machine {
  std::vector<Fibre> fibres = std::vector<Fibre>(1024);
  jmp_buf scheduler;
  std::function<void()> kernel;
  int count = 0, current = 0;
  bool falling = false, trapped = false;
  cudaError_t error = cudaSuccess;
  uint64_t exchange[32][32] = {};  // a word of each lane of each warp
};
inline Machine machine;

inline void wait(State where) {
  Fibre& fibre = machine.fibres[machine.current];
  fibre.state = where;
  if (_setjmp(fibre.here) == 0) _longjmp(machine.scheduler, 1);
  threadIdx = machine.fibres[machine.current].index;
}

// A fibre serves one thread of each block, one block after the other.
inline void serve() {
  while (true) {
    machine.kernel();
    wait(State::kDone);
  }
}

inline __attribute__((noinline)) void resume(Fibre& fibre) {
  constexpr size_t kStack = 128 << 10;
  threadIdx = fibre.index;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fibre.started) _longjmp(fibre.here, 1);
  fibre.started = true;
  if (fibre.stack.empty()) fibre.stack.resize(kStack);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibre.stack.data();
  context.uc_stack.ss_size = fibre.stack.size();
  context.uc_link = nullptr;
  makecontext(&context, serve, 0);
  setcontext(&context);
}

// Lets the fibres [first, last) go on if all that are not done wait at `where`.
inline bool release(int first, int last, State where) {
  bool any = false;
  for (int i = first; i < last; ++i) {
    if (machine.fibres[i].state == State::kDone) continue;
    if (machine.fibres[i].state != where) return false;
    any = true;
  }
  for (int i = first; any && i < last; ++i)
    if (machine.fibres[i].state == where) machine.fibres[i].state = State::kReady;
  return any;
}

inline bool run_block() {
  for (int i = 0; i < machine.count; ++i) {
    machine.fibres[i].state = State::kReady;
    machine.fibres[i].index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
  }
  // Each warp runs ahead as far as it can before the next one runs at all.
  const int warps = (machine.count + 31) / 32;
  while (true) {
    bool ran = false, all_done = true;
    for (int turn = 0; turn < warps; ++turn) {
      const int first = 32 * (machine.falling ? warps - 1 - turn : turn), last = std::min(first + 32, machine.count);
      do {
        for (int at = first; at < last; ++at) {
          const int i = machine.falling ? last - 1 - (at - first) : at;
          if (machine.fibres[i].state != State::kReady) continue;
          machine.current = i;
          resume(machine.fibres[i]);
          ran = true;
          if (machine.trapped) return false;
        }
      } while (release(first, last, State::kAtWarp));
      for (int i = first; i < last; ++i) all_done = all_done && machine.fibres[i].state == State::kDone;
    }
    if (all_done) return true;
    if (!release(0, machine.count, State::kAtBlock) && !ran) {
      std::fprintf(stderr, "cuda emulator: the threads of block (%u, %u, %u) wait for each other for ever\n", blockIdx.x,
                   blockIdx.y, blockIdx.z);
      return false;
    }
  }
}

inline void launch(dim3 grid, dim3 block, std::function<void()> kernel) {
  if (machine.error != cudaSuccess) return;
  const int64_t threads = int64_t(block.x) * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u || threads < 1 ||
      threads > 1024) {
    machine.error = cudaErrorInvalidConfiguration;
    return;
  }
  gridDim = grid, blockDim = block;
  machine.count = static_cast<int>(threads);
  machine.kernel = std::move(kernel);
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  for (int64_t at = 0; at < blocks; ++at) {
    const int64_t i = machine.falling ? blocks - 1 - at : at;
    blockIdx = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (int64_t(grid.x) * grid.y)));
    if (!run_block()) {
      for (Fibre& fibre : machine.fibres) fibre.started = false;  // they stopped in the middle of the kernel
      machine.error = cudaErrorLaunchFailure;
      return;
    }
  }
}

inline int warp() { return machine.current / 32; }
inline int lane() { return machine.current % 32; }

// Every lane's word; call `done_reading` before the next exchange.
inline const uint64_t* publish(uint64_t word) {
  machine.exchange[warp()][lane()] = word;
  wait(State::kAtWarp);
  return machine.exchange[warp()];
}
inline void done_reading() { wait(State::kAtWarp); }

template <typename T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  const uint64_t* words = publish(word);
  T result;
  std::memcpy(&result, words + source, sizeof(T));
  done_reading();
  return result;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::kAtBlock); }
inline void __syncwarp(unsigned = ~0u) { emulator::wait(emulator::State::kAtWarp); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, emulator::lane() ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int by) {
  const int lane = emulator::lane();
  return emulator::shuffle(value, lane < by ? lane : lane - by);
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::shuffle(value, source);
}
inline unsigned long long atomicMin(unsigned long long* at, unsigned long long value) {
  const unsigned long long before = *at;
  if (value < before) *at = value;
  return before;
}
inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}
[[noreturn]] inline void __trap() {
  emulator::machine.trapped = true;
  emulator::wait(emulator::State::kDone);
  std::abort();
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::machine.error;
  emulator::machine.error = cudaSuccess;
  emulator::machine.trapped = false;
  return error;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : 101; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
inline int emulated_capability = 80;
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrComputeCapabilityMajor ? emulated_capability / 10 : emulated_capability % 10;
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int binaryVersion;
};
template <typename Function>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Function) {
  return cudaSuccess;
}

#define EF_LAUNCH(kernel, grid, block, stream, ...)                                                  \
  ((void)(stream), emulator::launch(grid, block, [=, f = kernel] { [&](auto... a) { f(a...); }(__VA_ARGS__); }))

#define EF_CUDA_EMULATED 1
extern "C" __attribute__((visibility("default"))) inline __attribute__((used)) void ef_emulator_order(int falling) {
  emulator::machine.falling = falling != 0;
}
extern "C" __attribute__((visibility("default"))) inline __attribute__((used)) void ef_emulator_capability(int value) {
  emulated_capability = value;
}
