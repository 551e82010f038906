// ef_cuda_grouped_matmul and ef_cuda_grouped_outer: which kernel for which matrices, and the kernels that do any shape,
// format and device: tiles of 64 x 64 with ordinary arithmetic (float32 everywhere, bfloat16 on sm_75, odd sizes).
#include "cuda_matmul.cuh"

namespace edgefed {
namespace {

constexpr int kTile = EF_CUDA_TILE_ROWS;
constexpr int kDepth = 16;
constexpr int kSide = 16;            // threads are 16 x 16
constexpr int kEach = kTile / kSide;  // a thread has 4 x 4 sums, 16 apart
constexpr int kThreads = kSide * kSide;

// W[row, column] of a matrix with `width` columns, as the dequantized matrix of dtype T has it.
template <typename T>
EF_DEVICE float weight_at(const EfCudaMatrix& matrix, const float* table, int64_t row, int64_t column, int64_t width) {
  const int64_t at = row * width + column;
  if (matrix.format == EF_NF4) {
    const uint32_t byte = static_cast<const uint8_t*>(matrix.data)[at / 2];
    const float code = table[at % 2 != 0 ? byte & 15u : byte >> 4];
    return round_to<T>(code * matrix.scale[at / matrix.blocksize]);
  }
  if (matrix.format == EF_INT8)
    return round_to<T>(int8_value(static_cast<float>(static_cast<const int8_t*>(matrix.data)[at]), matrix.scale[row]));
  if (matrix.format == EF_F32) return round_to<T>(static_cast<const float*>(matrix.data)[at]);
  return to_float(static_cast<const T*>(matrix.data)[at]);
}

// sums[i][j] += sum over d < depth of a(i, d) * b(j, d); a and b give zero beyond their edges.
template <typename LoadA, typename LoadB>
EF_DEVICE void multiply(int64_t depth, LoadA a, LoadB b, float (&sums)[kEach][kEach]) {
  __shared__ float left[kDepth][kTile + 1], right[kDepth][kTile + 1];
  const int row = threadIdx.x / kSide, column = threadIdx.x % kSide;
  for (int64_t along = 0; along < depth; along += kDepth) {
    for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
      const int across = i / kDepth, d = i % kDepth;
      left[d][across] = along + d < depth ? a(across, along + d) : 0.0f;
      right[d][across] = along + d < depth ? b(across, along + d) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      float x[kEach], y[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) x[i] = left[d][row + kSide * i], y[i] = right[d][column + kSide * i];
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) sums[i][j] = fmaf(x[i], y[j], sums[i][j]);
    }
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    plain_kernel(const __grid_constant__ SlotTable slots, const __grid_constant__ Product product, int32_t format,
                 bool transposed) {
  __shared__ float table[16];
  const RowTile tile =
      find_tile(product.positions, product.tiles, slots.first, slots.last, blockIdx.x, EF_CUDA_TILE_ROWS);
  if (tile.slot < 0) return;
  const EfCudaMatrix& matrix = slots.matrices[tile.slot - slots.first];
  if (matrix.format != format || matrix.data == nullptr) return;
  fill_nf4_table(table, threadIdx.x);
  __syncthreads();
  const int64_t n = product.n, k = product.k, first = static_cast<int64_t>(blockIdx.y) * kTile;
  const T* x = static_cast<const T*>(product.x);
  float sums[kEach][kEach] = {};
  multiply(
      k,
      [&](int row, int64_t d) {
        if (row >= tile.count) return 0.0f;
        const int64_t at = tile.begin + row;
        return to_float(x[(product.x_rows != nullptr ? product.x_rows[at] : at) * k + d]);
      },
      [&](int column, int64_t d) {
        const int64_t at = first + column;
        if (at >= n) return 0.0f;
        return transposed ? weight_at<T>(matrix, table, d, at, n) : weight_at<T>(matrix, table, at, d, k);
      },
      sums);
  if (product.low_rank.low != nullptr && matrix.factor != nullptr) {
    const EfCudaLowRank& term = product.low_rank;
    multiply(
        term.rank,
        [&](int row, int64_t d) {
          if (row >= tile.count) return 0.0f;
          return to_float(static_cast<const T*>(term.low)[(tile.begin + row) * term.rank + d]);
        },
        [&](int column, int64_t d) {
          const int64_t at = first + column;
          if (at >= n) return 0.0f;
          const int64_t place = transposed ? d * n + at : at * term.rank + d;
          return term.dtype == EF_F32 ? round_to<T>(static_cast<const float*>(matrix.factor)[place])
                                      : to_float(static_cast<const T*>(matrix.factor)[place]);
        },
        sums);
  }
  const int row = threadIdx.x / kSide, column = threadIdx.x % kSide;
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t at = first + column + kSide * j;
      if (row + kSide * i >= tile.count || at >= n) continue;
      T* target = static_cast<T*>(product.y) + (tile.begin + row + kSide * i) * n + at;
      float value = matrix.alpha * sums[i][j];
      if (matrix.bias != nullptr) value += to_float(static_cast<const T*>(matrix.bias)[at]);
      if (product.accumulate) value += to_float(*target);
      *target = from_float<T>(value);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    plain_outer_kernel(const __grid_constant__ OuterTable slots, const __grid_constant__ Outer outer) {
  const int slot = slots.first + static_cast<int>(blockIdx.z);
  void* output = slots.outputs[blockIdx.z];
  if (output == nullptr) return;
  const int32_t begin = outer.positions[slot], count = outer.positions[slot + 1] - begin;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTile;
  const T* a = static_cast<const T*>(outer.a);
  const T* b = static_cast<const T*>(outer.b);
  float sums[kEach][kEach] = {};
  multiply(
      count,
      [&](int row, int64_t d) {
        return first_row + row < outer.m ? to_float(a[(begin + d) * outer.m + first_row + row]) : 0.0f;
      },
      [&](int column, int64_t d) {
        if (first_column + column >= outer.n) return 0.0f;
        const int64_t at = begin + d;
        return to_float(b[(outer.b_rows != nullptr ? outer.b_rows[at] : at) * outer.n + first_column + column]);
      },
      sums);
  const float alpha = slots.alphas[blockIdx.z];
  const int row = threadIdx.x / kSide, column = threadIdx.x % kSide;
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t m = first_row + row + kSide * i, n = first_column + column + kSide * j;
      if (m >= outer.m || n >= outer.n) continue;
      if (outer.is_float) {
        static_cast<float*>(output)[m * outer.n + n] = alpha * sums[i][j];
      } else {
        static_cast<T*>(output)[m * outer.n + n] = from_float<T>(alpha * sums[i][j]);
      }
    }
}

// --- choice -------------------------------------------------------------------------------------------------------

bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

int32_t log2_exact(int32_t value) {  // -1 unless a power of two
  for (int32_t shift = 0; shift < 31; ++shift)
    if (value == 1 << shift) return shift;
  return -1;
}

bool known_format(int32_t format, int32_t blocksize, int32_t dtype) {
  if (format == EF_NF4) return blocksize > 0;
  return format == EF_INT8 || format == EF_F32 || format == dtype;
}

// Rows of a tile of tensor cores. Few rows of a slot leave most of a large tile empty; a small one decodes the weights
// more often. Gradients of x, of training with its many rows, have the largest only.
int64_t tile_rows(int64_t pairs, int64_t num_slots, bool transposed) {
  if (transposed || pairs > 48 * num_slots) return EF_CUDA_TILE_ROWS;
  return pairs > 16 * num_slots ? EF_CUDA_MIDDLE_TILE_ROWS : EF_CUDA_SMALL_TILE_ROWS;
}

int32_t capability_of(int32_t device, int32_t* capability) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *capability = 10 * major + minor;
  return static_cast<int32_t>(error);
}

bool fits_tiles_outer(int32_t dtype, int64_t m, int64_t n, int32_t capability) {
  return m % 8 == 0 && n % 8 == 0 && (dtype == EF_F16 || (dtype == EF_BF16 && capability >= 80));
}

}  // namespace

int32_t launch_plain(const SlotTable& table, const Product& product, int32_t format, int32_t dtype, bool transposed,
                     int64_t row_tiles, void* stream) {
  return with_cuda_dtype(dtype, [&](auto type) -> int32_t {
    using T = decltype(type);
    const dim3 grid(static_cast<unsigned>(row_tiles), static_cast<unsigned>(ceil_div(product.n, kTile)));
    EF_LAUNCH(plain_kernel<T>, grid, kThreads, stream, table, product, format, transposed);
    return launched();
  });
}

int32_t launch_plain_outer(const OuterTable& table, const Outer& outer, int32_t dtype, void* stream) {
  return with_cuda_dtype(dtype, [&](auto type) -> int32_t {
    using T = decltype(type);
    const dim3 grid(static_cast<unsigned>(ceil_div(outer.n, kTile)), static_cast<unsigned>(ceil_div(outer.m, kTile)),
                    static_cast<unsigned>(table.last - table.first));
    EF_LAUNCH(plain_outer_kernel<T>, grid, kThreads, stream, table, outer);
    return launched();
  });
}

}  // namespace edgefed

using namespace edgefed;

extern "C" {

int32_t ef_cuda_can_matmul(int32_t format, int32_t blocksize, int32_t dtype, int64_t n, int64_t k, int32_t transposed,
                           int32_t kernel, int32_t capability) {
  if (dtype != EF_F32 && dtype != EF_F16 && dtype != EF_BF16) return 0;
  if (!known_format(format, blocksize, dtype) || n <= 0 || k <= 0) return 0;
  switch (kernel) {
    case EF_CUDA_ROWS:
      if (transposed || ceil_div(n, 8) > kMostBlocksY) return 0;
      if (format == EF_NF4) return k % 32 == 0 && blocksize % 32 == 0 && log2_exact(blocksize) >= 0;
      return k % (format == EF_INT8 ? 16 : 8) == 0;
    case EF_CUDA_TILES:
      if (dtype == EF_F32 || (dtype == EF_BF16 && capability < 80) || ceil_div(n, kTile) > kMostBlocksY) return 0;
      if (format == EF_NF4 && (blocksize % 8 != 0 || log2_exact(blocksize) < 0)) return 0;
      return n % 8 == 0 && k % 8 == 0;
    case EF_CUDA_PLAIN: return ceil_div(n, kTile) <= kMostBlocksY;
    default: return 0;
  }
}

int32_t ef_cuda_grouped_matmul(const EfCudaMatrix* matrices, int64_t num_slots, const int32_t* work, int64_t pairs,
                               const void* x, const int32_t* x_rows, void* y, int32_t dtype, int64_t n, int64_t k,
                               int32_t transposed, int32_t accumulate, const EfCudaLowRank* low_rank, int32_t kernel,
                               int32_t device, void* stream) {
  if (low_rank != nullptr && low_rank->dtype != dtype && low_rank->dtype != EF_F32) return EF_UNKNOWN_DTYPE;
  if (pairs <= 0 || num_slots <= 0 || n <= 0) return EF_OK;
  if (pairs > kMostBlocksX) return EF_UNSUPPORTED;
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    const EfCudaMatrix& matrix = matrices[slot];
    if (matrix.data != nullptr && !ef_cuda_can_matmul(matrix.format, matrix.blocksize, dtype, n, k, transposed,
                                                      EF_CUDA_PLAIN, 0))
      return EF_UNSUPPORTED;
  }
  const OnDevice here(device);
  if (here.error() != 0) return here.error();
  int32_t capability = 0;
  const int32_t error = capability_of(device, &capability);
  if (error != 0) return error;
  for (int64_t first = 0; first < num_slots; first += kSlotsPerLaunch) {
    SlotTable table = {};
    table.first = static_cast<int32_t>(first);
    table.last = static_cast<int32_t>(first + kSlotsPerLaunch < num_slots ? first + kSlotsPerLaunch : num_slots);
    const int32_t count = table.last - table.first;
    for (int32_t i = 0; i < count; ++i) {
      table.matrices[i] = matrices[first + i];
      table.matrices[i].block_shift = log2_exact(matrices[first + i].blocksize);
    }
    // A launch for each format that occurs; its blocks pass over the slots of the others.
    const int32_t formats[] = {EF_F32, EF_NF4, EF_INT8, dtype};
    for (int which = 0; which < (dtype == EF_F32 ? 3 : 4); ++which) {
      const int32_t format = formats[which];
      bool any = false;
      bool fits[] = {aligned(x) && aligned(y), aligned(x) && aligned(y)};  // EF_CUDA_ROWS, EF_CUDA_TILES
      if (low_rank != nullptr && (!aligned(low_rank->low) || low_rank->rank % 8 != 0)) fits[EF_CUDA_TILES] = false;
      for (int32_t i = 0; i < count; ++i) {
        const EfCudaMatrix& matrix = table.matrices[i];
        if (matrix.data == nullptr || matrix.format != format) continue;
        any = true;
        for (const int32_t each : {EF_CUDA_ROWS, EF_CUDA_TILES})
          fits[each] = fits[each] && aligned(matrix.data) && (each == EF_CUDA_ROWS || aligned(matrix.factor)) &&
                       ef_cuda_can_matmul(format, matrix.blocksize, dtype, n, k, transposed, each, capability);
      }
      if (!any) continue;
      // The requested kernel, or else the next more general one.
      int32_t chosen = kernel;
      if (chosen == EF_CUDA_ROWS && !fits[EF_CUDA_ROWS]) chosen = EF_CUDA_TILES;
      if (chosen == EF_CUDA_TILES && !fits[EF_CUDA_TILES]) chosen = EF_CUDA_PLAIN;
      const int64_t rows = chosen == EF_CUDA_ROWS    ? EF_CUDA_FEW_ROWS
                           : chosen == EF_CUDA_TILES ? tile_rows(pairs, num_slots, transposed != 0)
                                                     : EF_CUDA_TILE_ROWS;
      const Product product = {positions_of(work),
                               tiles_of(work, num_slots, static_cast<int>(rows)),
                               x, x_rows, y, n, k, accumulate,
                               low_rank != nullptr ? *low_rank : EfCudaLowRank{}};
      const int64_t row_tiles = most_tiles(pairs, count, rows);
      int32_t result = EF_UNSUPPORTED;
      switch (chosen) {
        case EF_CUDA_ROWS: result = launch_rows(table, product, format, dtype, row_tiles, stream); break;
        case EF_CUDA_TILES:
          result = launch_tiles(table, product, format, dtype, transposed != 0, static_cast<int32_t>(rows), row_tiles,
                                stream);
          break;
        default: result = launch_plain(table, product, format, dtype, transposed != 0, row_tiles, stream);
      }
      if (result != EF_OK) return result;
    }
  }
  return EF_OK;
}

int32_t ef_cuda_grouped_outer(void* const* outputs, const float* alphas, int64_t num_slots, const int32_t* work,
                              const void* a, const void* b, const int32_t* b_rows, int32_t dtype, int32_t output_dtype,
                              int64_t m, int64_t n, int32_t device, void* stream) {
  if (num_slots <= 0 || m <= 0 || n <= 0) return EF_OK;
  if (dtype != EF_F32 && dtype != EF_F16 && dtype != EF_BF16) return EF_UNKNOWN_DTYPE;
  if (output_dtype != EF_F32 && output_dtype != dtype) return EF_UNKNOWN_DTYPE;
  if (ceil_div(m, kTile) > kMostBlocksY || ceil_div(n, kTile) > kMostBlocksX) return EF_UNSUPPORTED;
  const OnDevice here(device);
  if (here.error() != 0) return here.error();
  int32_t capability = 0;
  const int32_t error = capability_of(device, &capability);
  if (error != 0) return error;
  const Outer outer = {positions_of(work), a, b, b_rows, m, n, output_dtype == EF_F32};
  for (int64_t first = 0; first < num_slots; first += kSlotsPerLaunch) {
    OuterTable table = {};
    table.first = static_cast<int32_t>(first);
    table.last = static_cast<int32_t>(first + kSlotsPerLaunch < num_slots ? first + kSlotsPerLaunch : num_slots);
    bool any = false, fits = aligned(a) && aligned(b) && fits_tiles_outer(dtype, m, n, capability);
    for (int32_t i = 0; i < table.last - table.first; ++i) {
      table.outputs[i] = outputs[first + i];
      table.alphas[i] = alphas[first + i];
      any = any || outputs[first + i] != nullptr;
      fits = fits && aligned(outputs[first + i]);
    }
    if (!any) continue;
    const int32_t result =
        fits ? launch_tiles_outer(table, outer, dtype, stream) : launch_plain_outer(table, outer, dtype, stream);
    if (result != EF_OK) return result;
  }
  return EF_OK;
}

}  // extern "C"
