// nvcuda::wmma for the emulator: 16 x 16 x 16 products of a warp. Lane l holds the elements l, l + 32, ... of a tile
// (row-major); that differs from the hardware, whose layout is not documented and must not be relied on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16, "only square tiles");
  T elements[8];
};

inline void expect_aligned(const void* at, size_t stride_bytes) {
  if (reinterpret_cast<uintptr_t>(at) % 32 || stride_bytes % 16) {
    std::fprintf(stderr, "cuda emulator: a wmma tile must be 32-byte aligned, its stride a multiple of 16 bytes\n");
    std::abort();
  }
}

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& tile, const T* from, unsigned stride) {
  expect_aligned(from, stride * sizeof(T));
  for (int i = 0; i < 8; ++i) {
    const int element = emulator::lane() + 32 * i, row = element / 16, column = element % 16;
    tile.elements[i] = std::is_same<Layout, row_major>::value ? from[row * stride + column] : from[column * stride + row];
  }
  __syncwarp();
}

template <typename T>
void store_matrix_sync(T* to, const fragment<accumulator, 16, 16, 16, T>& tile, unsigned stride, layout_t) {
  expect_aligned(to, stride * sizeof(T));
  for (int i = 0; i < 8; ++i) {
    const int element = emulator::lane() + 32 * i;
    to[element / 16 * stride + element % 16] = tile.elements[i];
  }
}

template <typename T>
void fill_fragment(fragment<accumulator, 16, 16, 16, T>& tile, T value) {
  for (T& element : tile.elements) element = value;
}

inline float wide(__half value) { return __half2float(value); }
inline float wide(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename A, typename B, typename T, typename LayoutA, typename LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 16, A>& out, const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b, const fragment<accumulator, 16, 16, 16, B>& in) {
  const void* own[2] = {&a, &b};
  const uint64_t* words = emulator::publish(reinterpret_cast<uint64_t>(own));
  const void* const* tiles[32];
  for (int lane = 0; lane < 32; ++lane) tiles[lane] = reinterpret_cast<const void* const*>(words[lane]);
  for (int i = 0; i < 8; ++i) {
    const int element = emulator::lane() + 32 * i, row = element / 16, column = element % 16;
    float sum = in.elements[i];
    for (int k = 0; k < 16; ++k) {
      const int at_a = row * 16 + k, at_b = k * 16 + column;
      const auto* tile_a = static_cast<const fragment<matrix_a, 16, 16, 16, T, LayoutA>*>(tiles[at_a % 32][0]);
      const auto* tile_b = static_cast<const fragment<matrix_b, 16, 16, 16, T, LayoutB>*>(tiles[at_b % 32][1]);
      sum += wide(tile_a->elements[at_a / 32]) * wide(tile_b->elements[at_b / 32]);
    }
    out.elements[i] = sum;
  }
  emulator::done_reading();
}

}  // namespace nvcuda::wmma
