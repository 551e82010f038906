// Products of many rows on tensor cores (half precision from sm_75, bfloat16 from sm_80): tiles of 16, 32 or 64 rows
// and 64 columns, weights decoded into shared memory on the way, sums in float32. The same loop makes forward products
// (W as stored), gradients of x (W transposed) and of W (both operands transposed); only the layout in shared memory
// differs. There are two buffers: while one is multiplied, 16-bit values are copied into the other past the registers
// (cp.async, from sm_80), and what must be decoded is loaded.
#include "cuda_matmul.cuh"
#include "cuda_tensor_cores.cuh"

namespace edgefed {
namespace {

constexpr int kTile = EF_CUDA_TILE_ROWS;  // columns of a block's result, and rows of the largest
constexpr int kThreads = 128;             // four warps
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocks = 3;  // of a multiprocessor at once: with four, kernels spill on sm_75 and sm_120
#else
constexpr int kBlocks = 4;
#endif
constexpr int kFragment = 16;
constexpr int kPatchStride = kFragment + 4;
constexpr int kPad = 8;  // values behind each row in shared memory, against bank conflicts; keeps 16-byte alignment
constexpr int kBand = 8;  // row tiles whose blocks run one after the other for all columns: their x stays in L2

// A block's result of kRows x kTile values: which part each warp has, and the step along the sum. Few rows have little
// to multiply between two barriers, so their steps are longer.
template <int kRows>
struct Shape {
  static constexpr int kDepth = kRows == kTile ? 32 : 64;
  static constexpr int kWarpColumns = kRows == 16 ? 4 : 2;
  static constexpr int kWarpRows = kThreads / kWarp / kWarpColumns;
  static constexpr int kDown = kRows / kWarpRows / kFragment;         // fragments of a warp
  static constexpr int kAcross = kTile / kWarpColumns / kFragment;
  static EF_DEVICE int row() { return static_cast<int>(threadIdx.x) / kWarp / kWarpColumns * kDown * kFragment; }
  static EF_DEVICE int column() { return static_cast<int>(threadIdx.x) / kWarp % kWarpColumns * kAcross * kFragment; }
};

template <typename T>
struct TensorCores {
#if defined(__CUDA_ARCH__)
  static constexpr bool exist = !std::is_same<T, __nv_bfloat16>::value || __CUDA_ARCH__ >= 800;
#else
  static constexpr bool exist = true;
#endif
};

// --- sources: eight neighbouring values of a matrix, zero beyond its edges ----------------------------------------
// `line` finds a stored row; `at` (a multiple of 8) is along it. kDirect: the values are stored as they are multiplied.

template <typename T>
struct DenseSource {
  static constexpr bool kDirect = true;
  struct Raw {
    uint4 bits;
  };
  struct Line {
    const T* from;
    int32_t width;  // 0 beyond the edge
  };
  const T* values;
  const int32_t* rows;  // which stored row a line is, or NULL
  int64_t width;
  int64_t lines;

  EF_DEVICE Line line(int64_t line) const {
    if (line >= lines) return {values, 0};
    const int64_t row = rows != nullptr ? rows[line] : line;
    return {values + row * width, static_cast<int32_t>(width)};
  }
  EF_DEVICE Raw load(const Line& line, int32_t at) const {
    if (at >= line.width) return {make_uint4(0, 0, 0, 0)};
    return {load_global(reinterpret_cast<const uint4*>(line.from + at))};
  }
  EF_DEVICE void begin(const Line& line, int32_t at, T* to) const { begin_copy(to, line.from + at, at < line.width); }
  EF_DEVICE void store(const Raw& raw, const float*, T* to) const { *reinterpret_cast<uint4*>(to) = raw.bits; }
};

template <typename T>
struct FloatSource {  // float32 values of a product in T
  static constexpr bool kDirect = false;
  struct Raw {
    float4 low, high;
  };
  struct Line {
    const float* from;
    int32_t width;
  };
  const float* values;
  int64_t width;
  int64_t lines;

  EF_DEVICE Line line(int64_t line) const {
    if (line >= lines) return {values, 0};
    return {values + line * width, static_cast<int32_t>(width)};
  }
  EF_DEVICE Raw load(const Line& line, int32_t at) const {
    if (at >= line.width) return {make_float4(0.0f, 0.0f, 0.0f, 0.0f), make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
    const float4* from = reinterpret_cast<const float4*>(line.from + at);
    return {load_global(from), load_global(from + 1)};
  }
  EF_DEVICE void store(const Raw& raw, const float*, T* to) const {
    const float all[8] = {raw.low.x, raw.low.y, raw.low.z, raw.low.w, raw.high.x, raw.high.y, raw.high.z, raw.high.w};
    store_eight(to, all);
  }
};

template <typename T>
struct Nf4Source {
  static constexpr bool kDirect = false;
  struct Raw {
    uint32_t codes;
    float scale;
  };
  struct Line {
    const uint8_t* packed;
    const float* scales;  // from that of the line's first value
    int32_t before;       // values of its block before that one
    int32_t width;
  };
  const uint8_t* packed;
  const float* scales;
  int64_t width;
  int64_t lines;
  int32_t block_shift;

  EF_DEVICE Line line(int64_t line) const {
    if (line >= lines) return {packed, scales, 0, 0};
    const int64_t first = line * width, block = first >> block_shift;
    return {packed + first / 2, scales + block, static_cast<int32_t>(first - (block << block_shift)),
            static_cast<int32_t>(width)};
  }
  EF_DEVICE Raw load(const Line& line, int32_t at) const {
    if (at >= line.width) return {0, 0.0f};
    return {load_global(reinterpret_cast<const uint32_t*>(line.packed + (static_cast<uint32_t>(at) >> 1))),
            load_global(line.scales + (static_cast<uint32_t>(line.before + at) >> block_shift))};
  }
  EF_DEVICE void store(const Raw& raw, const float* table, T* to) const {
    float values[8];
    decode_nf4(raw.codes, table, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= raw.scale;
    store_eight(to, values);
  }
};

template <typename T>
struct Int8Source {
  static constexpr bool kDirect = false;
  struct Raw {
    uint2 codes;
    float scale;
  };
  struct Line {
    const int8_t* packed;
    float scale;
    int32_t width;
  };
  const int8_t* packed;
  const float* scales;
  int64_t width;
  int64_t lines;

  EF_DEVICE Line line(int64_t line) const {
    if (line >= lines) return {packed, 0.0f, 0};
    return {packed + line * width, scales[line], static_cast<int32_t>(width)};
  }
  EF_DEVICE Raw load(const Line& line, int32_t at) const {
    if (at >= line.width) return {make_uint2(0, 0), 0.0f};
    return {load_global(reinterpret_cast<const uint2*>(line.packed + at)), line.scale};
  }
  EF_DEVICE void store(const Raw& raw, const float*, T* to) const {
    float values[8];
    decode_int8(raw.codes.x, raw.codes.y, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = int8_value(values[i], raw.scale);
    store_eight(to, values);
  }
};

template <int kFormat, typename T>
EF_DEVICE auto source_of(const EfCudaMatrix& matrix, int64_t lines, int64_t width) {
  if constexpr (kFormat == EF_NF4) {
    return Nf4Source<T>{static_cast<const uint8_t*>(matrix.data), matrix.scale, width, lines, matrix.block_shift};
  } else if constexpr (kFormat == EF_INT8) {
    return Int8Source<T>{static_cast<const int8_t*>(matrix.data), matrix.scale, width, lines};
  } else if constexpr (kFormat == EF_F32) {
    return FloatSource<T>{static_cast<const float*>(matrix.data), width, lines};
  } else {
    return DenseSource<T>{static_cast<const T*>(matrix.data), nullptr, width, lines};
  }
}

// --- the loop -----------------------------------------------------------------------------------------------------

// An operand in shared memory: kSpan rows or columns of the result. Its lines are those of the source: kAcross, a line
// is a row of the result (kSpan lines of kDepth along the sum); otherwise a step of the sum (kDepth lines of kSpan).
template <typename T, bool kAcross, int kSpan, int kDepth>
struct Operand {
  static constexpr int kLines = kAcross ? kSpan : kDepth;
  static constexpr int kWidth = kAcross ? kDepth : kSpan;
  static constexpr int kStride = kWidth + kPad;
  static constexpr int kValues = kLines * kStride;
  static constexpr int kEights = kSpan * kDepth / 8 / kThreads;  // groups of eight values that a thread moves in a step
  static_assert(kEights * 8 * kThreads == kSpan * kDepth, "every thread moves as much");

  // Where eight number i of this thread lies.
  static EF_DEVICE int line(int i) { return (i * kThreads + static_cast<int>(threadIdx.x)) / (kWidth / 8); }
  static EF_DEVICE int at(int i) { return (i * kThreads + static_cast<int>(threadIdx.x)) % (kWidth / 8) * 8; }

  // The lines of this thread's eights: the same in every step if a line is a row of the result.
  template <typename Source>
  static EF_DEVICE void find(const Source& source, int64_t across, int32_t along, typename Source::Line* lines) {
#pragma unroll
    for (int i = 0; i < kEights; ++i) lines[i] = source.line((kAcross ? across : along) + line(i));
  }
  // Begins to bring the values of a step: into `shared`, or into registers if they must be decoded.
  template <bool kAsync, typename Source>
  static EF_DEVICE void begin(const Source& source, const typename Source::Line* lines, int64_t across, int32_t along,
                              typename Source::Raw* raw, T* shared) {
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      const int32_t from = (kAcross ? along : static_cast<int32_t>(across)) + at(i);
      if constexpr (kAsync) {
        source.begin(lines[i], from, shared + line(i) * kStride + at(i));
      } else {
        raw[i] = source.load(lines[i], from);
      }
    }
  }
  template <typename Source>
  static EF_DEVICE void store(const Source& source, const typename Source::Raw* raw, const float* table, T* shared) {
#pragma unroll
    for (int i = 0; i < kEights; ++i) source.store(raw[i], table, shared + line(i) * kStride + at(i));
  }
  // The 16 x 16 values at (across, along) as registers of multiply_add. Their four 8 x 8 parts come in the order of the
  // left operand: down first, then along; or of two right operands, of columns 0..7 and 8..15: along first.
  template <bool kLeft>
  static EF_DEVICE void fragment(const T* shared, int across, int along, uint32_t (&out)[4]) {
    const int part = static_cast<int>(threadIdx.x) % kWarp / 8, line = threadIdx.x % 8;
    const int down = 8 * (kLeft ? part % 2 : part / 2), forward = 8 * (kLeft ? part / 2 : part % 2);
    if constexpr (kAcross) {
      load_matrices<false>(shared + (across + down + line) * kStride + along + forward, out);
    } else {
      load_matrices<true>(shared + (along + forward + line) * kStride + across + down, out);
    }
  }
};

// 16 x 16 sums of a warp, as two results of multiply_add side by side.
struct Sums {
  float half[2][4];
};

template <typename T, bool kAcrossA, bool kAcrossB, int kRows>
struct Shared {
  using A = Operand<T, kAcrossA, kRows, Shape<kRows>::kDepth>;
  using B = Operand<T, kAcrossB, kTile, Shape<kRows>::kDepth>;
  static constexpr int kPatches = kThreads / kWarp * kFragment * kPatchStride;  // float, in the place of the operands
  static_assert(kPatches * sizeof(float) <= (A::kValues + B::kValues) * 2 * sizeof(T), "patches fit");
  alignas(32) T values[2 * (A::kValues + B::kValues)];
  float table[16];

  EF_DEVICE T* a(int buffer) { return values + buffer * (A::kValues + B::kValues); }
  EF_DEVICE T* b(int buffer) { return a(buffer) + A::kValues; }
  EF_DEVICE float* patches() { return reinterpret_cast<float*>(values); }
};

// sums += tile of A B^T: rows a_first .. + kRows of A, columns b_first .. + 64, over `depth`.
template <typename T, bool kAcrossA, bool kAcrossB, int kRows, typename SourceA, typename SourceB>
EF_DEVICE void multiply(const SourceA& a, int64_t a_first, const SourceB& b, int64_t b_first, int32_t depth,
                        Shared<T, kAcrossA, kAcrossB, kRows>& shared,
                        Sums (&sums)[Shape<kRows>::kDown][Shape<kRows>::kAcross]) {
  using Part = Shape<kRows>;
  using A = typename Shared<T, kAcrossA, kAcrossB, kRows>::A;
  using B = typename Shared<T, kAcrossA, kAcrossB, kRows>::B;
  constexpr int kDepth = Part::kDepth;
  constexpr bool kAsyncA = SourceA::kDirect && kCopiesAsync, kAsyncB = SourceB::kDirect && kCopiesAsync;
  typename SourceA::Line lines_a[A::kEights];
  typename SourceB::Line lines_b[B::kEights];
  typename SourceA::Raw raw_a[A::kEights];
  typename SourceB::Raw raw_b[B::kEights];
  const auto begin = [&](int32_t along, int buffer) {
    if (!kAcrossA || along == 0) A::find(a, a_first, along, lines_a);
    if (!kAcrossB || along == 0) B::find(b, b_first, along, lines_b);
    A::template begin<kAsyncA>(a, lines_a, a_first, along, raw_a, shared.a(buffer));
    B::template begin<kAsyncB>(b, lines_b, b_first, along, raw_b, shared.b(buffer));
  };
  __syncthreads();  // the buffers are free, the table is filled
  begin(0, 0);
  int buffer = 0;
  for (int32_t along = 0; along < depth; along += kDepth, buffer ^= 1) {
    if constexpr (!kAsyncA) A::store(a, raw_a, shared.table, shared.a(buffer));
    if constexpr (!kAsyncB) B::store(b, raw_b, shared.table, shared.b(buffer));
    if constexpr (kAsyncA || kAsyncB) wait_for_copies();
    __syncthreads();  // the step is there, and every warp is done with the other buffer
    if (along + kDepth < depth) begin(along + kDepth, buffer ^ 1);  // on the way while the tensor cores work
#pragma unroll
    for (int step = 0; step < kDepth; step += kFragment) {
      uint32_t left[Part::kDown][4], right[Part::kAcross][4];
#pragma unroll
      for (int i = 0; i < Part::kDown; ++i)
        A::template fragment<true>(shared.a(buffer), Part::row() + kFragment * i, step, left[i]);
#pragma unroll
      for (int j = 0; j < Part::kAcross; ++j)
        B::template fragment<false>(shared.b(buffer), Part::column() + kFragment * j, step, right[j]);
#pragma unroll
      for (int i = 0; i < Part::kDown; ++i)
#pragma unroll
        for (int j = 0; j < Part::kAcross; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t own[2] = {right[j][2 * half], right[j][2 * half + 1]};
            multiply_add<T>(sums[i][j].half[half], left[i], own);
          }
    }
  }
}

// Hands each thread eight neighbouring sums at a time: write(row, column, values) within the tile of the block.
template <int kRows, typename Write>
EF_DEVICE void write_sums(const Sums (&sums)[Shape<kRows>::kDown][Shape<kRows>::kAcross], float* patches, Write write) {
  using Part = Shape<kRows>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* patch = patches + warp * kFragment * kPatchStride;
  __syncthreads();  // the patches take the place of the operands
#pragma unroll
  for (int i = 0; i < Part::kDown; ++i)
#pragma unroll
    for (int j = 0; j < Part::kAcross; ++j) {
#pragma unroll
      for (int at = 0; at < 8; ++at) {
        const int below = at % 4 / 2 * 8, column = at / 4 * 8 + lane % 4 * 2 + at % 2;
        patch[(lane / 4 + below) * kPatchStride + column] = sums[i][j].half[at / 4][at % 4];
      }
      __syncwarp();
      const int row = lane / 2, column = lane % 2 * 8;
      float values[8];
      load_eight(patch + row * kPatchStride + column, values);
      write(Part::row() + kFragment * i + row, Part::column() + kFragment * j + column, values);
      __syncwarp();
    }
}

// --- kernels ------------------------------------------------------------------------------------------------------

// Blocks take the columns of kBand row tiles one after the other.
template <int kFormat, typename T, bool kTransposed, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocks)
    tiles_kernel(const __grid_constant__ SlotTable slots, const __grid_constant__ Product product) {
  if constexpr (TensorCores<T>::exist) {
    __shared__ Shared<T, true, !kTransposed, kRows> shared;
    const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    const int64_t band = block / (kBand * gridDim.y), within = block % (kBand * gridDim.y);
    const int64_t left = gridDim.x - band * kBand, height = left < kBand ? left : kBand;
    const RowTile tile = find_tile(product.positions, product.tiles, slots.first, slots.last,
                                   static_cast<int32_t>(band * kBand + within % height), kRows);
    if (tile.slot < 0) return;
    const EfCudaMatrix& matrix = slots.matrices[tile.slot - slots.first];
    if (matrix.format != kFormat || matrix.data == nullptr) return;
    if (kFormat == EF_NF4) fill_nf4_table(shared.table, threadIdx.x);
    const int64_t n = product.n, k = product.k, first = within / height * kTile;
    // The rows of the tile are the lines [0, count) of x, through x_rows or moved to the tile's begin.
    const T* x = static_cast<const T*>(product.x) + (product.x_rows != nullptr ? 0 : tile.begin * k);
    const DenseSource<T> rows = {x, product.x_rows != nullptr ? product.x_rows + tile.begin : nullptr, k, tile.count};
    const auto weights = source_of<kFormat, T>(matrix, kTransposed ? k : n, kTransposed ? n : k);
    Sums sums[Shape<kRows>::kDown][Shape<kRows>::kAcross] = {};
    multiply(rows, 0, weights, first, static_cast<int32_t>(k), shared, sums);
    if (product.low_rank.low != nullptr && matrix.factor != nullptr) {
      const EfCudaLowRank& term = product.low_rank;
      const T* low = static_cast<const T*>(term.low) + tile.begin * term.rank;
      const DenseSource<T> low_rows = {low, nullptr, term.rank, tile.count};
      const int64_t lines = kTransposed ? term.rank : n, width = kTransposed ? n : term.rank;
      if (term.dtype == EF_F32) {
        const FloatSource<T> factor = {static_cast<const float*>(matrix.factor), width, lines};
        multiply(low_rows, 0, factor, first, static_cast<int32_t>(term.rank), shared, sums);
      } else {
        const DenseSource<T> factor = {static_cast<const T*>(matrix.factor), nullptr, width, lines};
        multiply(low_rows, 0, factor, first, static_cast<int32_t>(term.rank), shared, sums);
      }
    }
    T* y = static_cast<T*>(product.y);
    const T* bias = static_cast<const T*>(matrix.bias);
    write_sums<kRows>(sums, shared.patches(), [&](int row, int column, float* values) {
      if (row >= tile.count || first + column >= n) return;
      T* target = y + (tile.begin + row) * n + first + column;
      float other[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] *= matrix.alpha;
      if (bias != nullptr) {
        for (int i = 0; i < 8; ++i) values[i] += to_float(bias[first + column + i]);
      }
      if (product.accumulate) {
        load_eight(target, other);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] += other[i];
      }
      store_eight(target, values);
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    tiles_outer_kernel(const __grid_constant__ OuterTable slots, const __grid_constant__ Outer outer) {
  if constexpr (TensorCores<T>::exist) {
    __shared__ Shared<T, false, false, kTile> shared;
    const int slot = slots.first + static_cast<int>(blockIdx.z);
    void* output = slots.outputs[blockIdx.z];
    if (output == nullptr) return;
    const int32_t begin = outer.positions[slot], count = outer.positions[slot + 1] - begin;
    const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile;
    const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTile;
    const DenseSource<T> a = {static_cast<const T*>(outer.a) + begin * outer.m, nullptr, outer.m, count};
    const T* b_values = static_cast<const T*>(outer.b) + (outer.b_rows != nullptr ? 0 : begin * outer.n);
    const DenseSource<T> b = {b_values, outer.b_rows != nullptr ? outer.b_rows + begin : nullptr, outer.n, count};
    Sums sums[Shape<kTile>::kDown][Shape<kTile>::kAcross] = {};
    multiply(a, first_row, b, first_column, count, shared, sums);
    const float alpha = slots.alphas[blockIdx.z];
    write_sums<kTile>(sums, shared.patches(), [&](int row, int column, float* values) {
      if (first_row + row >= outer.m || first_column + column >= outer.n) return;
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] *= alpha;
      const int64_t at = (first_row + row) * outer.n + first_column + column;
      if (outer.is_float) {
        store_eight(static_cast<float*>(output) + at, values);
      } else {
        store_eight(static_cast<T*>(output) + at, values);
      }
    });
  }
}

template <int kFormat, typename T, bool kTransposed, int kRows>
int32_t launch(const SlotTable& table, const Product& product, int64_t row_tiles, void* stream) {
  const dim3 grid(static_cast<unsigned>(row_tiles), static_cast<unsigned>(ceil_div(product.n, kTile)));
  const auto kernel = tiles_kernel<kFormat, T, kTransposed, kRows>;
  EF_LAUNCH(kernel, grid, kThreads, stream, table, product);
  return launched();
}

template <int kFormat, typename T>
int32_t launch_either(const SlotTable& table, const Product& product, bool transposed, int32_t rows, int64_t row_tiles,
                      void* stream) {
  if (transposed)
    return rows == kTile ? launch<kFormat, T, true, kTile>(table, product, row_tiles, stream) : EF_UNSUPPORTED;
  switch (rows) {
    case EF_CUDA_SMALL_TILE_ROWS:
      return launch<kFormat, T, false, EF_CUDA_SMALL_TILE_ROWS>(table, product, row_tiles, stream);
    case EF_CUDA_MIDDLE_TILE_ROWS:
      return launch<kFormat, T, false, EF_CUDA_MIDDLE_TILE_ROWS>(table, product, row_tiles, stream);
    case kTile: return launch<kFormat, T, false, kTile>(table, product, row_tiles, stream);
    default: return EF_UNSUPPORTED;
  }
}

template <typename T>
int32_t launch_format(const SlotTable& table, const Product& product, int32_t format, bool transposed,
                      int32_t rows, int64_t row_tiles, void* stream) {
  switch (format) {
    case EF_NF4: return launch_either<EF_NF4, T>(table, product, transposed, rows, row_tiles, stream);
    case EF_INT8: return launch_either<EF_INT8, T>(table, product, transposed, rows, row_tiles, stream);
    case EF_F32: return launch_either<EF_F32, T>(table, product, transposed, rows, row_tiles, stream);
    default: return launch_either<DtypeOf<T>::value, T>(table, product, transposed, rows, row_tiles, stream);
  }
}

template <typename T>
int32_t launch_outer(const OuterTable& table, const Outer& outer, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(outer.n, kTile)), static_cast<unsigned>(ceil_div(outer.m, kTile)),
                  static_cast<unsigned>(table.last - table.first));
  EF_LAUNCH(tiles_outer_kernel<T>, grid, kThreads, stream, table, outer);
  return launched();
}

}  // namespace

int32_t launch_tiles(const SlotTable& table, const Product& product, int32_t format, int32_t dtype, bool transposed,
                     int32_t rows, int64_t row_tiles, void* stream) {
  switch (dtype) {
    case EF_F16: return launch_format<__half>(table, product, format, transposed, rows, row_tiles, stream);
    case EF_BF16: return launch_format<__nv_bfloat16>(table, product, format, transposed, rows, row_tiles, stream);
    default: return EF_UNSUPPORTED;
  }
}

int32_t launch_tiles_outer(const OuterTable& table, const Outer& outer, int32_t dtype, void* stream) {
  switch (dtype) {
    case EF_F16: return launch_outer<__half>(table, outer, stream);
    case EF_BF16: return launch_outer<__nv_bfloat16>(table, outer, stream);
    default: return EF_UNSUPPORTED;
  }
}

}  // namespace edgefed
