// The kernels of each instruction set for masked_experts.cpp.
#pragma once

#include "number_formats.h"

namespace edgefed {

// Whether this processor and this system have AMX with BF16.
bool has_amx();

#if EF_AMX
// Products of tiles in registers, kAmxOperations in each step; see limits.cpp.
float amx_steps(int64_t steps);
constexpr int64_t kAmxOperations = 4 * 16 * 16 * 32 * 2;
#endif

constexpr float kPer127 = 7.874015718698502e-3f;
constexpr int64_t kBlock = 64;  // weights decoded at once; all sizes of a kernel are multiples of it

// Block of the weight at this place of the flattened matrix. Block sizes are powers of two: dividing by a variable would
// take longer than decoding the block.
EF_INLINE int64_t block_of(const EfGroup& group, int64_t place) { return place >> __builtin_ctz(group.blocksize); }

// Dot products of few rows of x with decoded rows of W. x is arranged once, row by row, as the decoder reads it.
struct RowsKernel {
  int64_t (*arranged_bytes)(int32_t format, int64_t k);
  // One row of x (k values of dtype) to out; *scale is set where x is rounded to 8 bits.
  void (*arrange)(const void* x, int32_t dtype, int32_t format, int64_t k, void* out, float* scale);
  // Rows first .. last of W with all rows of the group: y[i * n + row], dtype as x.
  void (*run)(const EfGroup& group, const uint8_t* arranged, const float* scales, int64_t k, int64_t first,
              int64_t last, void* y, int32_t dtype, int64_t n);
};

// Null where the instruction set has no such kernel for these arguments.
const RowsKernel* rows_kernel(int32_t isa, int32_t format, int32_t dtype, bool int8);

extern const RowsKernel kRowsScalar;
#if EF_X86
extern const RowsKernel kRowsAvx2, kRowsAvx512, kRowsBf16, kRowsVnni;

// bfloat16 panels in registers; see masked_experts_tiles.cpp.
int64_t tiles_matmul(const EfGroup* groups, int64_t num_groups, const uint16_t* x, const int64_t* x_rows, uint16_t* y,
                     int64_t n, int64_t k, bool transposed, bool int8, bool amx, int32_t threads);
int64_t tiles_outer(const uint16_t* a, const uint16_t* b, const int64_t* b_rows, uint16_t* out, int64_t rows, int64_t m,
                    int64_t n, bool amx, int32_t threads);
#elif EF_NEON
extern const RowsKernel kRowsNeon;
#endif

}  // namespace edgefed
