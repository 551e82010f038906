// The expert products of one layer, and what surrounds them: sorting pairs by expert, and the weighted sum of a
// token's pairs. The specification is edgefed/kernels/masked_experts.py.
#include "masked_experts.h"
#include "parallel.h"

#include <algorithm>

namespace edgefed {

const RowsKernel* rows_kernel(int32_t isa, int32_t format, int32_t dtype, bool int8) {
  const bool quantized = format == EF_NF4 || format == EF_INT8;
  if (int8) {
#if EF_X86
    if ((isa == EF_ISA_AVX512_BF16 || isa == EF_ISA_AMX) && format == EF_INT8 && dtype != EF_F16)
      return &kRowsVnni;
#endif
    return nullptr;
  }
  switch (isa) {
    case EF_ISA_SCALAR: return quantized ? &kRowsScalar : nullptr;
#if EF_X86
    case EF_ISA_AVX2: return quantized ? &kRowsAvx2 : nullptr;
    case EF_ISA_AMX:
    case EF_ISA_AVX512_BF16:
      if (dtype == EF_BF16 && (quantized || format == EF_BF16)) return &kRowsBf16;
      [[fallthrough]];
    case EF_ISA_AVX512: return quantized ? &kRowsAvx512 : nullptr;
#elif EF_NEON
    case EF_ISA_NEON: return quantized ? &kRowsNeon : nullptr;
#endif
    default: return nullptr;
  }
}

namespace {

// How many rows of W a task takes: about 64 KB of packed weights.
constexpr int64_t kRowsOfTask = 64;

int64_t rows_matmul(const EfGroup* groups, int64_t num_groups, const void* x, const int64_t* x_rows, void* y,
                    int32_t dtype, int64_t n, int64_t k, bool int8, int32_t isa, int32_t threads) {
  const int64_t size = dtype == EF_F32 ? 4 : 2;
  int64_t stride = 0, pairs = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    const RowsKernel* kernel = rows_kernel(isa, groups[g].format, dtype, int8);
    stride = std::max(stride, kernel->arranged_bytes(groups[g].format, k));
    pairs = std::max(pairs, groups[g].row_begin + groups[g].row_count);
  }
  // One buffer for all: each row of x arranged as its expert's decoder reads it.
  auto* arranged = static_cast<uint8_t*>(scratch(0, static_cast<size_t>(pairs * (stride + 4)) + 64));
  if (arranged == nullptr) return EF_NO_MEMORY;
  float* scales = reinterpret_cast<float*>(arranged + pairs * stride);
  const auto arrange = [&](int64_t g) {
    const EfGroup& group = groups[g];
    const RowsKernel* kernel = rows_kernel(isa, group.format, dtype, int8);
    const int64_t bytes = kernel->arranged_bytes(group.format, k);
    for (int64_t i = 0; i < group.row_count; ++i) {
      const int64_t at = group.row_begin + i, from = x_rows ? x_rows[at] : at;
      const auto* source = static_cast<const char*>(x) + from * k * size;
      kernel->arrange(source, dtype, group.format, k, arranged + group.row_begin * stride + i * bytes, scales + at);
    }
  };
  parallel(num_groups, pairs * k > (1 << 16) ? threads : 1, arrange);
  const int64_t cuts = (n + kRowsOfTask - 1) / kRowsOfTask;
  parallel(num_groups * cuts, threads, [&](int64_t task) {
    const EfGroup& group = groups[task / cuts];
    if (group.row_count == 0) return;
    const int64_t first = task % cuts * kRowsOfTask, last = std::min(n, first + kRowsOfTask);
    auto* target = static_cast<char*>(y) + group.row_begin * n * size;
    rows_kernel(isa, group.format, dtype, int8)
        ->run(group, arranged + group.row_begin * stride, scales + group.row_begin, k, first, last, target, dtype, n);
  });
  return EF_OK;
}

template <typename T>
void combine_token(const typename T::Bits* rows, const int64_t* place, const float* weights, typename T::Bits* y,
                   int64_t top_k, int64_t hidden) {
  constexpr int64_t kPiece = 512;
  float sums[kPiece];
  for (int64_t at = 0; at < hidden; at += kPiece) {
    const int64_t piece = std::min(kPiece, hidden - at);
    std::fill(sums, sums + piece, 0.0f);
    for (int64_t k = 0; k < top_k; ++k) {
      if (place[k] < 0) continue;
      const typename T::Bits* row = rows + place[k] * hidden + at;
      const float weight = weights ? weights[k] : 1.0f;
      for (int64_t i = 0; i < piece; ++i) sums[i] += weight * T::widen(row[i]);
    }
    for (int64_t i = 0; i < piece; ++i) y[at + i] = T::narrow(sums[i]);
  }
}

}  // namespace
}  // namespace edgefed

using namespace edgefed;

extern "C" {

int64_t ef_sort_pairs(const int64_t* slots, int64_t pairs, int64_t num_slots, int64_t* order, int64_t* place,
                      int64_t* counts) {
  std::fill(counts, counts + num_slots, 0);
  for (int64_t i = 0; i < pairs; ++i) {
    if (slots[i] < 0) continue;
    if (slots[i] >= num_slots) return EF_BAD_INDEX;
    ++counts[slots[i]];
  }
  auto* next = static_cast<int64_t*>(scratch(0, static_cast<size_t>(num_slots + 1) * sizeof(int64_t)));
  if (next == nullptr) return EF_NO_MEMORY;
  int64_t kept = 0;
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    next[slot] = kept;
    kept += counts[slot];
  }
  for (int64_t i = 0; i < pairs; ++i) {
    place[i] = slots[i] < 0 ? -1 : next[slots[i]]++;
    if (place[i] >= 0) order[place[i]] = i;
  }
  return kept;
}

int32_t ef_can_matmul(int32_t format, int32_t blocksize, int32_t dtype, int64_t n, int64_t k, int32_t transposed,
                      int32_t kernel, int32_t isa) {
  isa = choose_isa(isa);
  const bool int8 = kernel == EF_ROWS_INT8 || kernel == EF_TILES_INT8;
  if (isa < 0 || k <= 0 || n <= 0 || k % kBlock || n % kBlock) return 0;
  if (format == EF_NF4 && (blocksize < kBlock || (blocksize & (blocksize - 1)))) return 0;
  if (dtype != EF_F32 && dtype != EF_F16 && dtype != EF_BF16) return 0;
  if (int8 && (format != EF_INT8 || transposed)) return 0;
  if (kernel == EF_ROWS || kernel == EF_ROWS_INT8)
    return !transposed && rows_kernel(isa, format, dtype, int8) != nullptr;
  return (isa == EF_ISA_AVX512_BF16 || isa == EF_ISA_AMX) && dtype == EF_BF16 &&
         (format == EF_NF4 || format == EF_INT8 || format == EF_BF16);
}

int64_t ef_grouped_matmul(const EfGroup* groups, int64_t num_groups, const void* x, const int64_t* x_rows, void* y,
                          int32_t dtype, int64_t n, int64_t k, int32_t transposed, int32_t kernel, int32_t isa,
                          int32_t threads) {
  for (int64_t g = 0; g < num_groups; ++g)
    if (!ef_can_matmul(groups[g].format, groups[g].blocksize, dtype, n, k, transposed, kernel, isa))
      return EF_UNSUPPORTED;
  isa = choose_isa(isa);
  if (num_groups > 0) {
    const EfGroup& end = groups[num_groups - 1];
    const int64_t size = n * (dtype == EF_F32 ? 4 : 2), begin = groups[0].row_begin;
    const size_t rows = static_cast<size_t>(end.row_begin + end.row_count - groups[0].row_begin);
    expect_writes(static_cast<char*>(y) + begin * size, rows * static_cast<size_t>(size), threads);
  }
  const bool int8 = kernel == EF_ROWS_INT8 || kernel == EF_TILES_INT8;
  if (kernel == EF_ROWS || kernel == EF_ROWS_INT8)
    return rows_matmul(groups, num_groups, x, x_rows, y, dtype, n, k, int8, isa, threads);
#if EF_X86
  return tiles_matmul(groups, num_groups, static_cast<const uint16_t*>(x), x_rows, static_cast<uint16_t*>(y), n, k,
                      transposed != 0, int8, isa == EF_ISA_AMX && !int8, threads);
#else
  return EF_UNSUPPORTED;
#endif
}

int64_t ef_outer_bf16(const uint16_t* a, const uint16_t* b, const int64_t* b_rows, uint16_t* out, int64_t rows,
                      int64_t m, int64_t n, int32_t isa, int32_t threads) {
#if EF_X86
  isa = choose_isa(isa);
  if ((isa == EF_ISA_AVX512_BF16 || isa == EF_ISA_AMX) && rows > 0 && n % kBlock == 0) {
    return tiles_outer(a, b, b_rows, out, rows, m, n, isa == EF_ISA_AMX, threads);
  }
#else
  (void)a, (void)b, (void)b_rows, (void)out, (void)rows, (void)m, (void)n, (void)isa, (void)threads;
#endif
  return EF_UNSUPPORTED;
}

int64_t ef_combine(const void* rows, const int64_t* place, const float* weights, void* y, int32_t dtype, int64_t tokens,
                   int64_t top_k, int64_t hidden, int32_t threads) {
  const auto run = [&](auto type) -> int64_t {
    using T = decltype(type);
    using Bits = typename T::Bits;
    parallel(tokens, tokens * hidden > (1 << 15) ? threads : 1, [&](int64_t t) {
      combine_token<T>(static_cast<const Bits*>(rows), place + t * top_k, weights ? weights + t * top_k : nullptr,
                       static_cast<Bits*>(y) + t * hidden, top_k, hidden);
    });
    return EF_OK;
  };
  switch (dtype) {
    case EF_F32: return run(Float32());
    case EF_F16: return run(Half());
    case EF_BF16: return run(Brain());
    default: return EF_UNKNOWN_DTYPE;
  }
}

}  // extern "C"
