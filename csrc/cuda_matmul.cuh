// Shared by the kernels of grouped products; ef_cuda_grouped_matmul (cuda_matmul.cu) chooses one.
#pragma once

#include "cuda_device.cuh"

namespace edgefed {

// The matrices of up to 64 neighbouring slots, passed to a kernel by value: nothing to copy, to keep alive or to wait
// for. 4096 bytes is the limit for all parameters of a kernel.
constexpr int kSlotsPerLaunch = 64;

struct SlotTable {
  EfCudaMatrix matrices[kSlotsPerLaunch];
  int32_t first, last;  // the slots [first, last)
};

struct Product {
  const int32_t* positions;  // begins of the slots
  const int32_t* tiles;      // begins of their row tiles, of the size that the kernel works with
  const void* x;
  const int32_t* x_rows;
  void* y;
  int64_t n, k;
  int32_t accumulate;
  EfCudaLowRank low_rank;  // low NULL: none
};
static_assert(sizeof(SlotTable) + sizeof(Product) <= 4096, "parameters of a kernel");

// One row tile: which slot, its rows [begin, begin + count) of the sorted positions.
struct RowTile {
  int slot;  // -1: nothing to do
  int32_t begin, count;
};

EF_BOTH RowTile find_tile(const int32_t* positions, const int32_t* tiles, int first, int last, int64_t index,
                          int rows) {
  const int64_t at = tiles[first] + index;
  const int slot = at >= tiles[last] ? -1 : find_slot(tiles, first, last, static_cast<int32_t>(at));
  if (slot < 0) return {-1, 0, 0};
  const int32_t begin = positions[slot] + static_cast<int32_t>(at - tiles[slot]) * rows;
  const int32_t left = positions[slot + 1] - begin;
  return {slot, begin, left < rows ? left : rows};
}

// Each launches its kernel for the matrices of one format in the table.
int32_t launch_rows(const SlotTable& table, const Product& product, int32_t format, int32_t dtype, int64_t row_tiles,
                    void* stream);
int32_t launch_tiles(const SlotTable& table, const Product& product, int32_t format, int32_t dtype, bool transposed,
                     int32_t rows, int64_t row_tiles, void* stream);
int32_t launch_plain(const SlotTable& table, const Product& product, int32_t format, int32_t dtype, bool transposed,
                     int64_t row_tiles, void* stream);

struct OuterTable {
  void* outputs[kSlotsPerLaunch];
  float alphas[kSlotsPerLaunch];
  int32_t first, last;
};

struct Outer {
  const int32_t* positions;
  const void* a;
  const void* b;
  const int32_t* b_rows;
  int64_t m, n;
  int32_t is_float;  // outputs are float32, whatever a and b are
};

int32_t launch_tiles_outer(const OuterTable& table, const Outer& outer, int32_t dtype, void* stream);
int32_t launch_plain_outer(const OuterTable& table, const Outer& outer, int32_t dtype, void* stream);

}  // namespace edgefed
