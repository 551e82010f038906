// cp.async, ldmatrix and mma.sync for the emulator, with the layouts of registers that the PTX manual gives ("Warp-level matrix
// instructions"): a lane holds what it would hold on a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace emulator {

// Copies that a thread has begun and not waited for: until then, what is there is what was there.
struct Copy {
  void* to;
  const void* from;
  int bytes;
};
inline std::vector<Copy> copies[1024];

inline void begin_copy(void* to, const void* from, bool is_there) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (is_there && reinterpret_cast<uintptr_t>(from) % 16)) {
    std::fprintf(stderr, "cuda emulator: both ends of cp.async must be 16-byte aligned\n");
    std::abort();
  }
  copies[machine.current].push_back({to, from, is_there ? 16 : 0});
}
inline void wait_for_copies() {
  for (const Copy& copy : copies[machine.current]) {
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  copies[machine.current].clear();
}

inline uint16_t half_word(const void* at) {
  uint16_t value;
  std::memcpy(&value, at, 2);
  return value;
}

// Four 8 x 8 matrices of 16-bit values; lane 8 i + r gives the address of row r of matrix i.
template <bool kTransposed>
void load_matrices(const void* row, uint32_t (&out)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) {
    std::fprintf(stderr, "cuda emulator: a row of ldmatrix must be 16-byte aligned\n");
    std::abort();
  }
  const uint64_t* rows = publish(reinterpret_cast<uint64_t>(row));
  const int line = lane() / 4, first = lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    uint32_t pair = 0;
    for (int j = 0; j < 2; ++j) {
      const int at_row = kTransposed ? first + j : line, at_column = kTransposed ? line : first + j;
      const char* from = reinterpret_cast<const char*>(rows[8 * i + at_row]) + 2 * at_column;
      pair |= static_cast<uint32_t>(half_word(from)) << (16 * j);
    }
    out[i] = pair;
  }
  done_reading();
}

template <typename T>
float value_of(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * which));
  T value;
  std::memcpy(&value, &bits, 2);
  if constexpr (std::is_same<T, __half>::value) {
    return __half2float(value);
  } else {
    return __bfloat162float(value);
  }
}

// c (16 x 8) += a (16 x 16) b (16 x 8).
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Own {
    uint32_t a[4], b[2];
  } own;
  std::memcpy(own.a, a, sizeof(own.a));
  std::memcpy(own.b, b, sizeof(own.b));
  const uint64_t* words = publish(reinterpret_cast<uint64_t>(&own));
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + 8 * (i / 2), column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const auto* of_a = reinterpret_cast<const Own*>(words[row % 8 * 4 + k % 8 / 2]);
      const auto* of_b = reinterpret_cast<const Own*>(words[column * 4 + k % 8 / 2]);
      c[i] += value_of<T>(of_a->a[row / 8 + k / 8 * 2], k % 2) * value_of<T>(of_b->b[k / 8], k % 2);
    }
  }
  done_reading();
}

}  // namespace emulator
