// Decoded weights in the order that matrix instructions read: what the kernels of tiles share, AVX-512 with BF16 and AMX.
#pragma once

#include "masked_experts.h"

#if EF_X86
#include <immintrin.h>

#define EF_BRAIN EF_TARGET_AVX512_BF16
#define EF_BRAIN_INLINE EF_TARGET_AVX512_BF16 EF_INLINE

namespace edgefed {

// The products of all groups of one call; see ef_grouped_matmul.
struct Problem {
  const EfGroup* groups;
  const uint16_t* x;
  const int64_t* x_rows;
  uint16_t* y;
  int64_t n, k;
  bool transposed, int8;
};

// Rows row .. row + rows of the sorted pairs, with the panels first .. last of one expert.
struct Piece {
  int64_t group, row, rows, first, last;
};

namespace {

constexpr int64_t kPanel = 64;          // outputs of a panel: four registers
constexpr int64_t kChunkRows = 256;     // rows of x that a panel is multiplied with
constexpr int64_t kPanelBytes = 1 << 17;  // the second-level cache, 1 MB, holds x, a panel and what the next is made of
enum ScratchUse { kScratchX = 1, kScratchPanel = 2, kScratchSums = 3, kScratchScales = 4 };

// Rows in block `index` of `blocks` over `rows` rows: as equal as can be.
EF_INLINE int64_t block_begin(int64_t rows, int64_t blocks, int64_t index) { return rows * index / blocks; }

EF_BRAIN_INLINE __m512i load(const void* at) { return _mm512_loadu_si512(at); }
EF_BRAIN_INLINE void store(void* at, __m512i value) { _mm512_storeu_si512(at, value); }

struct Pair {
  __m512i first, second;  // 32 bfloat16 each
};

// 64 weights as bfloat16. NF4: the even ones, then the odd ones; otherwise in order.
EF_BRAIN_INLINE Pair decode_nf4(const uint8_t* packed, float absmax) {
  const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(kNf4), _mm512_set1_ps(absmax));
  const __m512i table = _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(scaled)));
  const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  // vpermw reads five bits of an index; the table is there twice, so the fifth does not matter.
  return {_mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), table), _mm512_permutexvar_epi16(pairs, table)};
}

EF_BRAIN_INLINE __m512 widen_int8(const int8_t* values, __m512 absmax) {
  const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(wide), absmax), _mm512_set1_ps(kPer127));
}

EF_BRAIN_INLINE Pair decode_int8(const int8_t* values, float absmax) {
  const __m512 scale = _mm512_set1_ps(absmax);
  return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(widen_int8(values + 16, scale), widen_int8(values, scale))),
          reinterpret_cast<__m512i>(
              _mm512_cvtne2ps_pbh(widen_int8(values + 48, scale), widen_int8(values + 32, scale)))};
}

// Weights (row, column .. column + 64) of the expert; the matrix has `columns` columns.
template <int32_t format>
EF_BRAIN_INLINE Pair decode(const EfGroup& group, int64_t columns, int64_t row, int64_t column) {
  const int64_t at = row * columns + column;
  if constexpr (format == EF_NF4)
    return decode_nf4(static_cast<const uint8_t*>(group.data) + (at >> 1), group.scale[block_of(group, at)]);
  if constexpr (format == EF_INT8) return decode_int8(static_cast<const int8_t*>(group.data) + at, group.scale[row]);
  const uint16_t* values = static_cast<const uint16_t*>(group.data) + at;
  return {load(values), load(values + 32)};
}

// 16 x 16 words of 32 bits.
EF_BRAIN_INLINE void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// --- panels of outputs that are columns of W ----------------------------------------------------------------------
// A panel holds, for each step (two k of bfloat16), 64 words of 32 bits: one for each output.

EF_BRAIN_INLINE void interleave_rows(__m512i upper, __m512i lower, uint32_t* out) {
  const __m512i low = _mm512_unpacklo_epi16(upper, lower), high = _mm512_unpackhi_epi16(upper, lower);
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  store(out, _mm512_permutex2var_epi64(low, first, high));
  store(out + 16, _mm512_permutex2var_epi64(low, second, high));
}

// Outputs are columns of W: `panels` panels from column `output`, reduction over the rows begin .. end (an even number
// of them). Panel after panel, `words` words apart. NF4 outputs lie even before odd in a panel.
template <int32_t format>
EF_BRAIN void pack_columns(const EfGroup& group, int64_t columns, int64_t output, int64_t panels, int64_t begin,
                           int64_t end, uint32_t* panel, int64_t words) {
  constexpr int64_t kBits = format == EF_NF4 ? 4 : format == EF_INT8 ? 8 : 16, kAhead = 32;
  for (int64_t row = begin; row < end; row += 2, panel += kPanel) {
    // Rows lie apart, which the processor's own prefetching does not follow. Into the second-level cache: in the first
    // one, rows that are a power of two apart would displace each other.
    for (int64_t ahead = row + kAhead; ahead < row + kAhead + 2; ++ahead)
      for (int64_t byte = 0; byte < panels * kPanel * kBits / 8; byte += 64)
        _mm_prefetch(static_cast<const char*>(group.data) + ((ahead * columns + output) * kBits >> 3) + byte, _MM_HINT_T1);
    for (int64_t p = 0; p < panels; ++p) {
      const Pair upper = decode<format>(group, columns, row, output + p * kPanel);
      const Pair lower = decode<format>(group, columns, row + 1, output + p * kPanel);
      interleave_rows(upper.first, lower.first, panel + p * words);
      interleave_rows(upper.second, lower.second, panel + p * words + 32);
    }
  }
}

// Past the caches, for results that are not read again soon: a line that is written as a whole need not be read first.
EF_BRAIN_INLINE void store_past(void* at, __m512i value) { _mm512_stream_si512(static_cast<__m512i*>(at), value); }

// 64 sums to bfloat16, past the caches.
EF_BRAIN_INLINE void finish_row_past(const __m512 (&s)[4], uint16_t* y) {
  store_past(y, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(s[1], s[0])));
  store_past(y + 32, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(s[3], s[2])));
}

// 64 sums to bfloat16. `evens_first`: outputs lie even before odd.
EF_BRAIN_INLINE void finish_row(const __m512 (&s)[4], bool evens_first, uint16_t* y) {
  if (evens_first) {
    for (int half = 0; half < 2; ++half) {
      const __m512i even = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(s[half])));
      const __m512i odd = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(s[2 + half])));
      store(y + 32 * half, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  } else {
    store(y, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(s[1], s[0])));
    store(y + 32, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(s[3], s[2])));
  }
}

// Rows begin .. end of b, 64 columns from `column`, in pairs of rows; an odd last row meets zero.
EF_BRAIN void pack_b(const uint16_t* b, const int64_t* rows, int64_t stride, int64_t column, int64_t begin, int64_t end,
                    uint32_t* panel) {
  for (int64_t p = begin; p < end; p += 2, panel += kPanel) {
    const uint16_t* upper = b + (rows ? rows[p] : p) * stride + column;
    const __m512i zero = _mm512_setzero_si512();
    __m512i low0 = zero, low1 = zero;
    if (p + 1 < end) {
      const uint16_t* lower = b + (rows ? rows[p + 1] : p + 1) * stride + column;
      low0 = load(lower);
      low1 = load(lower + 32);
    }
    interleave_rows(load(upper), low0, panel);
    interleave_rows(load(upper + 32), low1, panel + 32);
  }
}

}  // namespace

#if EF_AMX
// out[m, n] = sum_p a[p, m] * b[b_rows[p], n]; see ef_outer_bf16.
struct Outer {
  const uint16_t *a, *b;
  const int64_t* b_rows;
  uint16_t* out;
  int64_t rows, m, n;
};
constexpr int64_t kOuterStep = 32;  // m is a number of these
int64_t amx_outer(const Outer& problem, int32_t threads);

// y of one piece of bfloat16 products; see masked_experts_amx.cpp.
int64_t amx_piece(const Problem& problem, const Piece& piece);
#endif

}  // namespace edgefed
#endif
