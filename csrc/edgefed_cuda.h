// The C interface of edgefed's CUDA library, edgefed/_cuda.so: plain C types, no link to Python or torch.
// edgefed/kernels/cuda_library.py declares the same functions; increase EF_CUDA_ABI_VERSION when a signature changes.
//
// Every function enqueues its kernels on `stream` of `device` and returns immediately: nothing here waits for the
// device, copies to the host or allocates. Pointers are device pointers unless stated otherwise. The result is EF_OK, a negative
// EfError, or a positive cudaError_t. Every kernel adds floating point numbers in a fixed order.
#pragma once

#include "edgefed.h"

#define EF_CUDA_ABI_VERSION 3

// The operand of one slot in a product. data NULL: the slot is skipped, and its rows of y stay unchanged.
struct EfCudaMatrix {
  const void* data;    // as EfGroup.data
  const float* scale;  // as EfGroup.scale
  const void* bias;    // (n) of the dtype of y, or NULL
  const void* factor;  // EfCudaLowRank, or NULL
  int32_t format;      // an EfDtype: that of x, or EF_F32; EF_NF4 or EF_INT8
  int32_t blocksize;   // NF4
  float alpha;         // factor of the product (not of the bias)
  int32_t block_shift;  // NF4: log2(blocksize), set by the library
};

// The low-rank term of a product: x[i] W^T + low[i] F^T, or x[i] W + low[i] F where the product is transposed, for slots
// with a factor F (n, rank), transposed (rank, n). low (pairs, rank) of the dtype of x.
struct EfCudaLowRank {
  const void* low;
  int64_t rank;
  int32_t dtype;  // of the factors: that of x, or EF_F32
};

// The kernel of a product, the most specialized one first.
enum EfCudaKernel {
  EF_CUDA_ROWS = 0,   // few rows for each expert: dot products with weights decoded on the fly
  EF_CUDA_TILES = 1,  // tensor cores, tiles of 16, 32 or 64 rows and 64 columns
  EF_CUDA_PLAIN = 2,  // any shape, format and device
};

// How the gate G is computed from a router's output, in the order of GATE_KINDS (edgefed/kernels/router_statistics.py).
enum EfCudaGate {
  EF_CUDA_PROBABILITY = 0,
  EF_CUDA_SOFTMAX = 1,
  EF_CUDA_SIGMOID = 2,  // divided by its sum over the experts
};

// Row tiles that the sorted pairs of a slot are cut into: of EF_CUDA_ROWS; of EF_CUDA_TILES, by the mean rows of a slot;
// the largest also of EF_CUDA_PLAIN.
#define EF_CUDA_FEW_ROWS 4
#define EF_CUDA_SMALL_TILE_ROWS 16
#define EF_CUDA_MIDDLE_TILE_ROWS 32
#define EF_CUDA_TILE_ROWS 64

#ifdef __cplusplus
extern "C" {
#endif

EF_API int32_t ef_cuda_abi_version(void);
// EF_OK if the kernels of this library can run on the device, else a cudaError_t with the reason.
EF_API int32_t ef_cuda_device_ready(int32_t device);
// Describes a positive result.
EF_API const char* ef_cuda_error_text(int32_t code);

// --- sorting: offsets and work lists of the other functions ------------------------------------------------------

// int32 elements of `work` and `scratch`.
EF_API int64_t ef_cuda_work_size(int64_t num_slots);
EF_API int64_t ef_cuda_sort_scratch(int64_t pairs, int64_t num_slots);
// Stable sort of the pairs by slot; pairs with slot < 0 are dropped. slots (pairs) int64, pair p belongs to token
// p / top_k. order (pairs): the pair at each sorted position; tokens (pairs): its token; both undefined beyond the
// pairs that are not dropped. place (pairs): the sorted position of a pair, -1 if dropped. work: per slot the begin of
// its positions, and of its row tiles of each size. A slot >= num_slots aborts the device, as torch's index assertions do.
EF_API int32_t ef_cuda_sort_pairs(const int64_t* slots, int64_t pairs, int64_t num_slots, int32_t top_k, int32_t* order,
                                  int32_t* tokens, int32_t* place, int32_t* work, int32_t* scratch, int32_t device,
                                  void* stream);

// --- products ----------------------------------------------------------------------------------------------------

// Whether the kernel supports a product with such a matrix; `capability` is 10 * major + minor.
EF_API int32_t ef_cuda_can_matmul(int32_t format, int32_t blocksize, int32_t dtype, int64_t n, int64_t k,
                                  int32_t transposed, int32_t kernel, int32_t capability);

// y[i] = alpha * (x[x_rows[i]] W^T + low-rank term) + bias, or with W where transposed, for the sorted positions i of
// each slot. matrices (num_slots) in host memory; W is (n, k), transposed (k, n). x (., k), y (pairs, n) of dtype; x_rows
// NULL is the identity. accumulate adds to y. kernel is a request: where it does not support a format, the next one of
// EfCudaKernel runs. Rows of y without a pair stay unchanged. low_rank NULL: none.
EF_API int32_t ef_cuda_grouped_matmul(const struct EfCudaMatrix* matrices, int64_t num_slots, const int32_t* work,
                                      int64_t pairs, const void* x, const int32_t* x_rows, void* y, int32_t dtype,
                                      int64_t n, int64_t k, int32_t transposed, int32_t accumulate,
                                      const struct EfCudaLowRank* low_rank, int32_t kernel, int32_t device,
                                      void* stream);

// outputs[slot][m, n] = alpha * sum over the positions i of the slot of a[i, m] * b[b_rows[i], n]; zeros for a slot
// without rows, nothing where outputs[slot] is NULL. outputs and alphas (num_slots) in host memory. a and b are of
// dtype, outputs of output_dtype: dtype or EF_F32.
EF_API int32_t ef_cuda_grouped_outer(void* const* outputs, const float* alphas, int64_t num_slots, const int32_t* work,
                                     const void* a, const void* b, const int32_t* b_rows, int32_t dtype,
                                     int32_t output_dtype, int64_t m, int64_t n, int32_t device, void* stream);

// --- between rows of pairs and rows of tokens --------------------------------------------------------------------

// y[t] = sum_k weights[t, k] * rows[place[t, k]] over the k with place >= 0, in float32 and in the order of k.
// weights (float32) NULL: all 1.
EF_API int32_t ef_cuda_combine(const void* rows, const int32_t* place, const float* weights, void* y, int32_t dtype,
                               int64_t tokens, int64_t top_k, int64_t hidden, int32_t device, void* stream);
// rows[i] = weights[order[i]] * y[tokens[i]] for the positions i of pairs that are not dropped.
EF_API int32_t ef_cuda_spread(const void* y, const int32_t* order, const int32_t* tokens, const float* weights,
                              const int32_t* work, int64_t num_slots, void* rows, int32_t dtype, int64_t pairs,
                              int64_t hidden, int32_t device, void* stream);
// dots[order[i]] = <a[i], b[b_rows[i]]>, for the positions i of pairs that are not dropped. b_rows NULL is the identity.
// Then, unless weights is NULL, a[i] *= weights[order[i]].
EF_API int32_t ef_cuda_pair_dots(void* a, const void* b, const int32_t* b_rows, const int32_t* order,
                                 const float* weights, const int32_t* work, int64_t num_slots, float* dots,
                                 int32_t dtype, int64_t pairs, int64_t width, int32_t device, void* stream);

// --- SwiGLU: h = silu(g) u for the two halves g, u of each row of gate_up (pairs, 2 width) ---------------------------

// hidden (pairs, width) = h, for the positions of pairs that are not dropped.
EF_API int32_t ef_cuda_swiglu(const void* gate_up, const int32_t* work, int64_t num_slots, void* hidden, int32_t dtype,
                              int64_t pairs, int64_t width, int32_t device, void* stream);
// With d (pairs, width), the gradient of h without the pair's weight w: dots[order[i]] = d . h; gate_up_grad = [dg, du]
// of w d, which may be gate_up itself; hidden = h, which may be d, unless NULL.
EF_API int32_t ef_cuda_swiglu_backward(const void* gate_up, const void* d, const int32_t* order, const float* weights,
                                       const int32_t* work, int64_t num_slots, void* gate_up_grad, void* hidden,
                                       float* dots, int32_t dtype, int64_t pairs, int64_t width, int32_t device,
                                       void* stream);

// --- router statistics: edgefed/kernels/router_statistics.py ------------------------------------------------------

// float64 elements of `partials`.
EF_API int64_t ef_cuda_statistics_scratch(int64_t tokens, int64_t experts);
// statistics (6, experts) float64 += one batch; router (tokens, experts) gives G by kind, an EfCudaGate; indices
// (tokens, top_k) int64; weights (tokens, top_k) of the dtype of router or float32. With received (tokens), which may be
// null, statistics have a seventh row: its sum over the tokens of each expert. An index outside the experts aborts the
// device.
EF_API int32_t ef_cuda_router_statistics(double* statistics, const void* router, int32_t router_dtype, int32_t kind,
                                         const int64_t* indices, const void* weights, int32_t weight_dtype,
                                         const float* received, int64_t tokens, int64_t experts, int64_t top_k,
                                         double* partials, int32_t device, void* stream);

// --- quantization: edgefed/kernels/quantization.py ----------------------------------------------------------------

// As the functions of edgefed.h without ef_cuda_, the same bytes. *error (device, int64) must hold -1 converted to
// unsigned, that is the largest value; it becomes the index of the first block or row with an infinity or NaN.
EF_API int32_t ef_cuda_quantize_nf4(const void* values, int32_t dtype, int64_t n, int64_t blocksize, uint8_t* packed,
                                    float* absmax, uint64_t* error, int32_t device, void* stream);
EF_API int32_t ef_cuda_quantize_int8(const void* values, int32_t dtype, int64_t rows, int64_t columns, int8_t* packed,
                                     float* absmax, uint64_t* error, int32_t device, void* stream);
EF_API int32_t ef_cuda_dequantize_nf4(const uint8_t* packed, const float* absmax, int64_t n, int64_t blocksize,
                                      void* out, int32_t dtype, int32_t device, void* stream);
EF_API int32_t ef_cuda_dequantize_int8(const int8_t* packed, const float* absmax, int64_t rows, int64_t columns,
                                       void* out, int32_t dtype, int32_t device, void* stream);

#ifdef __cplusplus
}
#endif
