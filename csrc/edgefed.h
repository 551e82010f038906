// The C interface of edgefed's native library: plain C types, no link to Python or torch, loaded with ctypes.
// edgefed/native.py declares the same functions; increase EF_ABI_VERSION when a signature changes.
#pragma once

#include <stdint.h>

#define EF_ABI_VERSION 2

#if defined(_WIN32)
#define EF_API __declspec(dllexport)
#else
#define EF_API __attribute__((visibility("default")))
#endif

// Floating point types of a tensor frame. Raw bits, little-endian.
enum EfDtype { EF_F64 = 0, EF_F32 = 1, EF_F16 = 2, EF_BF16 = 3 };

// How the weights of an expert are stored: an EfDtype, or one of these (see edgefed/kernels/quantization.py).
enum EfFormat { EF_NF4 = 16, EF_INT8 = 17 };

// Instruction sets that have kernels; EF_ISA_BEST selects the best of this processor.
enum EfIsa {
  EF_ISA_BEST = -1,
  EF_ISA_SCALAR = 0,
  EF_ISA_AVX2 = 1,         // AVX2, FMA, F16C
  EF_ISA_AVX512 = 2,       // AVX-512 F, BW, DQ, VL
  EF_ISA_AVX512_BF16 = 3,  // and BF16, VNNI
  EF_ISA_AMX = 4,          // and AMX with BF16
  EF_ISA_NEON = 10,
};

// Which kernel of ef_grouped_matmul to run.
enum EfKernel {
  EF_ROWS = 0,       // dot products with weights decoded on the fly: few rows of x for each expert
  EF_ROWS_INT8 = 1,  // the same for INT8 weights, x rounded to 8 bits row by row
  EF_TILES = 2,      // bfloat16 panels of decoded weights, register tiles: many rows of x
  EF_TILES_INT8 = 3,
};

// Kind of a router's output; see edgefed/kernels/router_statistics.py.
enum EfGate { EF_PROBABILITY = 0, EF_SOFTMAX = 1, EF_SIGMOID = 2 };

enum EfError {
  EF_OK = 0,
  EF_UNKNOWN_DTYPE = -2,
  EF_UNSUPPORTED = -3,  // this instruction set, format or shape has no such kernel
  EF_NO_MEMORY = -4,
  EF_BAD_INDEX = -5,
};

// The rows row_begin .. row_begin + row_count of x (after x_rows) and this expert's matrix (rows, columns).
struct EfGroup {
  const void* data;    // dense values, packed NF4 nibbles or int8, row-major
  const float* scale;  // absmax: NF4 of each block of the matrix, INT8 of each row; NULL for dense values
  int64_t row_begin;
  int64_t row_count;
  int32_t format;
  int32_t blocksize;  // NF4
};

#ifdef __cplusplus
extern "C" {
#endif

EF_API int ef_abi_version(void);

// Index of the first infinity or NaN among n values, -1 when all are finite, -2 for an unknown dtype.
EF_API int64_t ef_first_nonfinite(const void* raw, int32_t dtype, int64_t n);

// accumulator[i] += weight * raw[i] in double: one rounding for the product, one for the sum.
// Returns the result of ef_first_nonfinite; the accumulator is unchanged unless that is -1.
EF_API int64_t ef_fold_block(double* accumulator, const void* raw, int32_t dtype, int64_t n, double weight);

// out[i] = accumulator[i] rounded to dtype, to nearest, ties to even. bfloat16 rounds through float32, as
// edgefed.protocol.frames.narrow does. Returns 0, or -2 for an unknown dtype.
EF_API int64_t ef_narrow_block(const double* accumulator, void* out, int32_t dtype, int64_t n);

// --- codecs of changes: edgefed/kernels/compression.py is the specification -------------------------------------

// `top`: values of a whole block that are sent, 0 for all.
struct EfCodec {
  int32_t block;  // at most 4096
  int32_t bits;
  int32_t top;
};

// n values to bytes, whose number is codec.size_bytes(n). Returns EF_OK, or a positive number if a value is not finite
// or larger than a scale may be.
EF_API int64_t ef_encode_change(const struct EfCodec* codec, const float* values, int64_t n, uint8_t* out);
// The inverse, of valid bytes. Others give other values; nothing is written beyond `out`.
EF_API void ef_decode_change(const struct EfCodec* codec, const uint8_t* raw, int64_t n, float* out);
// EF_OK if the bytes are valid, otherwise 1 + the number of the first block that is not.
EF_API int64_t ef_check_change(const struct EfCodec* codec, const uint8_t* raw, int64_t n);

// --- quantization: edgefed/kernels/quantization.py is the specification -----------------------------------------

// The best instruction set of this processor, and whether one of EfIsa can run here.
EF_API int32_t ef_best_isa(void);
EF_API int32_t ef_has_isa(int32_t isa);

// One tensor of n values to packed ((n + 1) / 2) and absmax (one for each block; the last may be short).
// Returns EF_OK, EF_UNKNOWN_DTYPE, or 1 + the index of the first block with an infinity or NaN.
EF_API int64_t ef_quantize_nf4(const void* values, int32_t dtype, int64_t n, int64_t blocksize, uint8_t* packed,
                               float* absmax, int32_t isa, int32_t threads);
// A matrix to int8 with one absmax for each row. Returns as above, with rows in place of blocks.
EF_API int64_t ef_quantize_int8(const void* values, int32_t dtype, int64_t rows, int64_t columns, int8_t* packed,
                                float* absmax, int32_t isa, int32_t threads);
EF_API int64_t ef_dequantize_nf4(const uint8_t* packed, const float* absmax, int64_t n, int64_t blocksize, void* out,
                                 int32_t dtype, int32_t isa, int32_t threads);
EF_API int64_t ef_dequantize_int8(const int8_t* packed, const float* absmax, int64_t rows, int64_t columns, void* out,
                                  int32_t dtype, int32_t isa, int32_t threads);

// Nested absmax (experts, blocks): out = values[code] * absmax of each `blocksize` codes + mean of the expert, with two
// roundings. `values` are the 256 of the code.
EF_API int64_t ef_unnest_scales(const uint8_t* codes, const float* absmax, const float* mean, const float* values,
                                int64_t experts, int64_t blocks, int64_t blocksize, float* out, int32_t threads);

// --- masked experts: edgefed/kernels/masked_experts.py ----------------------------------------------------------

// Stable counting sort of the pairs by slot, without the dropped ones (slot < 0).
// slots (pairs); order (the remaining pairs) indices of pairs by slot; place (pairs) position of a pair in order, -1 if
// dropped; counts (num_slots). Returns the number of remaining pairs, or EF_BAD_INDEX if a slot >= num_slots.
EF_API int64_t ef_sort_pairs(const int64_t* slots, int64_t pairs, int64_t num_slots, int64_t* order, int64_t* place,
                             int64_t* counts);

// y[i] = x[x_rows[i]] W^T (transposed = 0, W is (n, k)) or x[x_rows[i]] W (transposed = 1, W is (k, n)) for the rows of
// each group. x (., k) and y (., n) of one dtype; x_rows NULL is the identity. Sums are float32.
EF_API int64_t ef_grouped_matmul(const struct EfGroup* groups, int64_t num_groups, const void* x, const int64_t* x_rows,
                                 void* y, int32_t dtype, int64_t n, int64_t k, int32_t transposed, int32_t kernel,
                                 int32_t isa, int32_t threads);
// Whether ef_grouped_matmul has that kernel for a group of that format.
EF_API int32_t ef_can_matmul(int32_t format, int32_t blocksize, int32_t dtype, int64_t n, int64_t k, int32_t transposed,
                             int32_t kernel, int32_t isa);

// out[m, n] = sum_p a[p, m] * b[b_rows[p], n] over p < rows, bfloat16 with float32 sums: the gradient of a weight.
EF_API int64_t ef_outer_bf16(const uint16_t* a, const uint16_t* b, const int64_t* b_rows, uint16_t* out, int64_t rows,
                             int64_t m, int64_t n, int32_t isa, int32_t threads);

// y[t] = sum_k weights[t, k] * rows[place[t, k]] over the k with place >= 0, in float32 and in the order of k.
// weights NULL: all 1. weights are float32.
EF_API int64_t ef_combine(const void* rows, const int64_t* place, const float* weights, void* y, int32_t dtype,
                          int64_t tokens, int64_t top_k, int64_t hidden, int32_t threads);

// act (rows, width) = silu(gate) * value of up (rows, 2 width), gate before value.
EF_API int64_t ef_swiglu(const void* up, void* act, int32_t dtype, int64_t rows, int64_t width, int32_t isa,
                         int32_t threads);
// Also its gradient: with d (rows, width) that of act before the weight (rows) of each pair, d_up (rows, 2 width) is
// that of up for weight * d, and d_weights (rows) = d . act.
EF_API int64_t ef_swiglu_backward(const void* up, const void* d, const float* weights, void* act, void* d_up,
                                  float* d_weights, int32_t dtype, int64_t rows, int64_t width, int32_t isa,
                                  int32_t threads);

// --- router statistics: edgefed/kernels/router_statistics.py ----------------------------------------------------

// statistics (6, experts) float64 += one batch. router (tokens, experts) is the router's output for each expert:
// probabilities (EF_PROBABILITY), or logits of a softmax or of a normalized sigmoid; indices and weights (tokens,
// top_k). Returns EF_OK, or EF_BAD_INDEX with nothing added when an index lies outside the experts.
EF_API int64_t ef_router_statistics(double* statistics, const void* router, int32_t router_dtype, int32_t kind,
                                    const int64_t* indices, const void* weights, int32_t weights_dtype, int64_t tokens,
                                    int64_t experts, int64_t top_k, int32_t isa, int32_t threads);

// --- limits -----------------------------------------------------------------------------------------------------

// Runs the multiply-adds of EF_F32, EF_BF16, EF_INT8 (AVX-512) or EF_BF16_AMX on registers. Returns the number of
// operations (two for each multiply-add), or EF_UNSUPPORTED if this processor lacks them.
enum { EF_BF16_AMX = 32 };
EF_API int64_t ef_arithmetic_steps(int32_t dtype, int64_t steps, int32_t threads);

#ifdef __cplusplus
}
#endif
