// Products of few rows: every weight is read once from memory, decoded, and multiplied with up to four rows of x. The
// time is that of reading the packed weights.
#include "cuda_matmul.cuh"

namespace edgefed {
namespace {

constexpr int kWarps = 4;    // of a block
constexpr int kColumns = 2;  // rows of W of a warp, so that a value of x serves twice

// How a format is read: `kEights` times eight values at once.
template <int kFormat, typename T>
struct Reader {  // dense values of T, or float
  using Value = std::conditional_t<kFormat == EF_F32, float, T>;
  static constexpr int kEights = 1;
  struct Raw {
    float values[8];
  };
  const Value* row;
  float factor = 1.0f;

  EF_DEVICE Reader(const EfCudaMatrix& matrix, int64_t row, int64_t k)
      : row(static_cast<const Value*>(matrix.data) + row * k) {}
  EF_DEVICE void load(int64_t piece, Raw& raw, float& scale) const {
    load_eight(row + 8 * piece, raw.values);
    scale = 1.0f;
  }
  static EF_DEVICE void decode(const Raw& raw, int, const float*, float* out) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = round_to<T>(raw.values[i]);
  }
};

template <typename T>
struct Reader<EF_NF4, T> {  // 32 codes, all of one block of the scale
  static constexpr int kEights = 4;
  struct Raw {
    uint4 codes;
  };
  const uint8_t* row;
  const float* scales;
  int64_t first;
  int32_t block_shift;
  float factor = 1.0f;

  EF_DEVICE Reader(const EfCudaMatrix& matrix, int64_t row, int64_t k)
      : row(static_cast<const uint8_t*>(matrix.data) + row * k / 2),
        scales(matrix.scale),
        first(row * k),
        block_shift(matrix.block_shift) {}
  EF_DEVICE void load(int64_t piece, Raw& raw, float& scale) const {
    raw.codes = *reinterpret_cast<const uint4*>(row + 16 * piece);
    scale = scales[(first + 32 * piece) >> block_shift];
  }
  static EF_DEVICE void decode(const Raw& raw, int eight, const float* table, float* out) {
    const uint32_t codes = eight == 0 ? raw.codes.x : eight == 1 ? raw.codes.y : eight == 2 ? raw.codes.z : raw.codes.w;
    decode_nf4(codes, table, out);
  }
};

template <typename T>
struct Reader<EF_INT8, T> {
  static constexpr int kEights = 2;
  struct Raw {
    uint4 codes;
  };
  const int8_t* row;
  float factor;

  EF_DEVICE Reader(const EfCudaMatrix& matrix, int64_t row, int64_t k)
      : row(static_cast<const int8_t*>(matrix.data) + row * k), factor(matrix.scale[row] * kInt8Step) {}
  EF_DEVICE void load(int64_t piece, Raw& raw, float& scale) const {
    raw.codes = *reinterpret_cast<const uint4*>(row + 16 * piece);
    scale = 1.0f;
  }
  static EF_DEVICE void decode(const Raw& raw, int eight, const float*, float* out) {
    if (eight == 0) {
      decode_int8(raw.codes.x, raw.codes.y, out);
    } else {
      decode_int8(raw.codes.z, raw.codes.w, out);
    }
  }
};

// This lane's part of low[i] . F[column] for the rows of the tile and two columns: every 32nd of the rank.
template <typename T, typename F, int kRows>
EF_DEVICE void add_low_rank(const F* factor, const Product& product, const RowTile& tile, int64_t first_column,
                            float (&sums)[kRows][kColumns]) {
  const int64_t rank = product.low_rank.rank;
  const T* low = static_cast<const T*>(product.low_rank.low) + tile.begin * rank;
  for (int64_t at = threadIdx.x % kWarp; at < rank; at += kWarp) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t column = first_column + c < product.n ? first_column + c : first_column;
      const float value = round_to<T>(to_float(factor[column * rank + at]));
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        sums[r][c] = fmaf(to_float(low[(r < tile.count ? r : tile.count - 1) * rank + at]), value, sums[r][c]);
    }
  }
}

template <int kFormat, typename T, int kRows>
EF_DEVICE void multiply(const EfCudaMatrix& matrix, const Product& product, const RowTile& tile, int64_t first_column,
                        const float* table) {
  using R = Reader<kFormat, T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t n = product.n, k = product.k;
  const T* x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {  // rows beyond the tile repeat its last one, and are not written
    const int64_t at = tile.begin + (r < tile.count ? r : tile.count - 1);
    x[r] = static_cast<const T*>(product.x) + (product.x_rows != nullptr ? product.x_rows[at] : at) * k;
  }
  // The second row of W may lie beyond its end: then it repeats the first.
  const R readers[kColumns] = {R(matrix, first_column, k),
                               R(matrix, first_column + 1 < n ? first_column + 1 : first_column, k)};
  float sums[kRows][kColumns] = {};
  for (int64_t piece = lane; piece < k / (8 * R::kEights); piece += kWarp) {
    typename R::Raw raw[kColumns];
    float scales[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) readers[c].load(piece, raw[c], scales[c]);
    float parts[kRows][kColumns] = {};
#pragma unroll
    for (int eight = 0; eight < R::kEights; ++eight) {
      float w[kColumns][8];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) R::decode(raw[c], eight, table, w[c]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float values[8];
        load_eight(x[r] + 8 * (piece * R::kEights + eight), values);
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
#pragma unroll
          for (int i = 0; i < 8; ++i) parts[r][c] = fmaf(values[i], w[c][i], parts[r][c]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[r][c] = fmaf(parts[r][c], scales[c], sums[r][c]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sums[r][c] *= readers[c].factor;
  if (product.low_rank.low != nullptr && matrix.factor != nullptr) {
    if (product.low_rank.dtype == EF_F32) {
      add_low_rank<T>(static_cast<const float*>(matrix.factor), product, tile, first_column, sums);
    } else {
      add_low_rank<T>(static_cast<const T*>(matrix.factor), product, tile, first_column, sums);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float sum = sums[r][c];
      for (int by = kWarp / 2; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
      const int64_t column = first_column + c;
      if (lane != r * kColumns + c || r >= tile.count || column >= n) continue;
      T* target = static_cast<T*>(product.y) + (tile.begin + r) * n + column;
      float value = matrix.alpha * sum;
      if (matrix.bias != nullptr) value += to_float(static_cast<const T*>(matrix.bias)[column]);
      if (product.accumulate) value += to_float(*target);
      *target = from_float<T>(value);
    }
}

template <int kFormat, typename T>
__global__ void __launch_bounds__(kWarps* kWarp)
    rows_kernel(const __grid_constant__ SlotTable slots, const __grid_constant__ Product product) {
  __shared__ float table[16];
  if (kFormat == EF_NF4) {
    fill_nf4_table(table, threadIdx.x);
    __syncthreads();
  }
  const RowTile tile =
      find_tile(product.positions, product.tiles, slots.first, slots.last, blockIdx.x, EF_CUDA_FEW_ROWS);
  if (tile.slot < 0) return;
  const EfCudaMatrix& matrix = slots.matrices[tile.slot - slots.first];
  if (matrix.format != kFormat || matrix.data == nullptr) return;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.x / kWarp) * kColumns;
  if (column >= product.n) return;
  if (tile.count == 1) {
    multiply<kFormat, T, 1>(matrix, product, tile, column, table);
  } else if (tile.count == 2) {
    multiply<kFormat, T, 2>(matrix, product, tile, column, table);
  } else {
    multiply<kFormat, T, EF_CUDA_FEW_ROWS>(matrix, product, tile, column, table);
  }
}

template <int kFormat, typename T>
int32_t launch(const SlotTable& table, const Product& product, int64_t row_tiles, void* stream) {
  const dim3 grid(static_cast<unsigned>(row_tiles), static_cast<unsigned>(ceil_div(product.n, kWarps * kColumns)));
  const auto kernel = rows_kernel<kFormat, T>;
  EF_LAUNCH(kernel, grid, kWarps * kWarp, stream, table, product);
  return launched();
}

}  // namespace

int32_t launch_rows(const SlotTable& table, const Product& product, int32_t format, int32_t dtype, int64_t row_tiles,
                    void* stream) {
  return with_cuda_dtype(dtype, [&](auto type) -> int32_t {
    using T = decltype(type);
    switch (format) {
      case EF_NF4: return launch<EF_NF4, T>(table, product, row_tiles, stream);
      case EF_INT8: return launch<EF_INT8, T>(table, product, row_tiles, stream);
      case EF_F32: return launch<EF_F32, T>(table, product, row_tiles, stream);
      default: return launch<DtypeOf<T>::value, T>(table, product, row_tiles, stream);
    }
  });
}

}  // namespace edgefed
