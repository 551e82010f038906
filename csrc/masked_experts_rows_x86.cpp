// Few rows of x for each expert: AVX2, AVX-512, and AVX-512 with BF16 and VNNI.
#include "masked_experts.h"

#if EF_X86
#include <immintrin.h>

namespace edgefed {
namespace avx2 {
namespace {

#define EF_HERE EF_TARGET_AVX2
struct Lanes {
  static constexpr int kLanes = 8;
  __m256 v;
  EF_HERE static EF_INLINE Lanes broadcast(float a) { return {_mm256_set1_ps(a)}; }
  EF_HERE static EF_INLINE Lanes zero() { return {_mm256_setzero_ps()}; }
  EF_HERE static EF_INLINE Lanes load(const float* at) { return {_mm256_loadu_ps(at)}; }
  EF_HERE static EF_INLINE Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.v, b.v)}; }
  EF_HERE static EF_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  EF_HERE static EF_INLINE float sum(Lanes a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
};

EF_HERE EF_INLINE __m256 look_up(__m256i code) {
  const __m256 choose = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));  // bit 3 of the code to the sign
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(kNf4), code),
                          _mm256_permutevar8x32_ps(_mm256_loadu_ps(kNf4 + 8), code), choose);
}

EF_HERE EF_INLINE void decode_nf4(const uint8_t* packed, float* out) {
  for (int i = 0; i < 32; i += 8) {
    const __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i)));
    _mm256_storeu_ps(out + i, look_up(_mm256_srli_epi32(pairs, 4)));
    _mm256_storeu_ps(out + 32 + i, look_up(pairs));
  }
}

EF_HERE EF_INLINE void decode_int8(const int8_t* values, float* out) {
  for (int i = 0; i < kBlock; i += 8) {
    const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + i)));
    _mm256_storeu_ps(out + i, _mm256_cvtepi32_ps(wide));
  }
}

}  // namespace

#define kRowsHere kRows
extern const RowsKernel kRows;
#include "masked_experts_rows.inc"
#undef EF_HERE
}  // namespace avx2

namespace avx512 {
namespace {

#define EF_HERE EF_TARGET_AVX512
struct Lanes {
  static constexpr int kLanes = 16;
  __m512 v;
  EF_HERE static EF_INLINE Lanes broadcast(float a) { return {_mm512_set1_ps(a)}; }
  EF_HERE static EF_INLINE Lanes zero() { return {_mm512_setzero_ps()}; }
  EF_HERE static EF_INLINE Lanes load(const float* at) { return {_mm512_loadu_ps(at)}; }
  EF_HERE static EF_INLINE Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
  EF_HERE static EF_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  EF_HERE static EF_INLINE float sum(Lanes a) { return _mm512_reduce_add_ps(a.v); }
};

EF_HERE EF_INLINE void decode_nf4(const uint8_t* packed, float* out) {
  const __m512 table = _mm512_loadu_ps(kNf4);
  for (int i = 0; i < 32; i += 16) {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i)));
    _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table));
    _mm512_storeu_ps(out + 32 + i, _mm512_permutexvar_ps(pairs, table));
  }
}

EF_HERE EF_INLINE void decode_int8(const int8_t* values, float* out) {
  for (int i = 0; i < kBlock; i += 16) {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i)));
    _mm512_storeu_ps(out + i, _mm512_cvtepi32_ps(wide));
  }
}

}  // namespace

extern const RowsKernel kRows;
#include "masked_experts_rows.inc"
#undef EF_HERE
#undef kRowsHere
}  // namespace avx512

const RowsKernel kRowsAvx2 = avx2::kRows;
const RowsKernel kRowsAvx512 = avx512::kRows;

// --- BF16 and VNNI ----------------------------------------------------------------------------------------------

namespace {

#define EF_BRAIN EF_TARGET_AVX512_BF16
#define EF_BRAIN_INLINE EF_TARGET_AVX512_BF16 EF_INLINE

// x row by row: a float32 factor of the row's sum (VNNI) lies apart, in `scales`.
int64_t brain_bytes(int32_t, int64_t k) { return 2 * k; }
int64_t vnni_bytes(int32_t, int64_t k) { return k; }

// NF4 in steps of 128 weights: 64 packed bytes are 32 words of four codes, which shifts by 4, 8 and 12 bits bring to
// their end, where vpermw reads them.
constexpr int64_t kStep = 128;

// x for that: of 128 values first those that the unshifted words meet, 4 i + 1, then 4 i, 4 i + 3, 4 i + 2.
EF_BRAIN void arrange_steps(const uint16_t* x, int64_t k, uint16_t* out) {
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 16; ++i) {
    order[0][i] = static_cast<uint16_t>(4 * i + 1);
    order[0][16 + i] = static_cast<uint16_t>(4 * i);
    order[1][i] = static_cast<uint16_t>(4 * i + 3);
    order[1][16 + i] = static_cast<uint16_t>(4 * i + 2);
  }
  for (int64_t at = 0; at < k; at += kStep) {
    const __m512i a = _mm512_loadu_si512(x + at), b = _mm512_loadu_si512(x + at + 32);
    const __m512i c = _mm512_loadu_si512(x + at + 64), d = _mm512_loadu_si512(x + at + 96);
    for (int half = 0; half < 2; ++half) {
      const __m512i pick = _mm512_load_si512(order[half]);
      const __m512i first = _mm512_permutex2var_epi16(a, pick, b), second = _mm512_permutex2var_epi16(c, pick, d);
      _mm512_storeu_si512(out + at + 64 * half, _mm512_shuffle_i64x2(first, second, 0x44));
      _mm512_storeu_si512(out + at + 64 * half + 32, _mm512_shuffle_i64x2(first, second, 0xEE));
    }
  }
}

EF_BRAIN void arrange_brain(const void* x, int32_t, int32_t format, int64_t k, void* out, float*) {
  const uint16_t* values = static_cast<const uint16_t*>(x);
  if (format == EF_NF4 && k % kStep == 0) return arrange_steps(values, k, static_cast<uint16_t*>(out));
  if (format != EF_NF4) {
    std::memcpy(out, x, static_cast<size_t>(2 * k));
    return;
  }
  alignas(64) uint16_t order[64];
  for (int i = 0; i < 32; ++i) {
    order[i] = static_cast<uint16_t>(2 * i);
    order[32 + i] = static_cast<uint16_t>(2 * i + 1);
  }
  const __m512i evens = _mm512_load_si512(order), odds = _mm512_load_si512(order + 32);
  uint16_t* target = static_cast<uint16_t*>(out);
  for (int64_t at = 0; at < k; at += kBlock) {
    const __m512i a = _mm512_loadu_si512(values + at), b = _mm512_loadu_si512(values + at + 32);
    _mm512_storeu_si512(target + at, _mm512_permutex2var_epi16(a, evens, b));
    _mm512_storeu_si512(target + at + 32, _mm512_permutex2var_epi16(a, odds, b));
  }
}

// To unsigned 8 bits around 128, one scale for each row: |x - scale * (byte - 128)| <= scale / 2, scale = max |x| / 127.
EF_BRAIN void arrange_vnni(const void* x, int32_t dtype, int32_t, int64_t k, void* out, float* scale) {
  const auto widen = [&](int64_t i) {
    return dtype == EF_BF16 ? widen_brain(static_cast<const uint16_t*>(x)[i]) : static_cast<const float*>(x)[i];
  };
  float largest = 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    const float magnitude = bits_as<float>(bits_as<uint32_t>(widen(i)) & 0x7FFFFFFFu);
    largest = magnitude > largest ? magnitude : largest;
  }
  *scale = largest / 127.0f;
  const float factor = largest > 0 ? 127.0f / largest : 0.0f;
  uint8_t* target = static_cast<uint8_t*>(out);
  // Adding 1.5 * 2^23 rounds to nearest, ties to even, and leaves the integer in the last bits.
  for (int64_t i = 0; i < k; ++i)
    target[i] = static_cast<uint8_t>(bits_as<uint32_t>(widen(i) * factor + 12582912.0f) + 128u);
}

struct Pair {
  __m512i first, second;
};

template <int32_t format>
EF_BRAIN_INLINE Pair decode(const EfGroup& group, int64_t place) {
  if constexpr (format == EF_NF4) {
    const __m512 absmax = _mm512_set1_ps(group.scale[block_of(group, place)]);
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(kNf4), absmax);
    const __m512i table = _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(scaled)));
    const auto* packed = reinterpret_cast<const __m256i*>(static_cast<const uint8_t*>(group.data) + (place >> 1));
    const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(packed));
    // vpermw reads five bits of an index; the table is there twice, so the fifth does not matter.
    return {_mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), table), _mm512_permutexvar_epi16(pairs, table)};
  }
  if constexpr (format == EF_INT8) {  // 8 bits fit into a bfloat16; the row's scale comes last
    const int8_t* values = static_cast<const int8_t*>(group.data) + place;
    __m512 f[4];
    for (int i = 0; i < 4; ++i)
      f[i] = _mm512_cvtepi32_ps(
          _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 16 * i))));
    return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(f[1], f[0])),
            reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(f[3], f[2]))};
  }
  const uint16_t* values = static_cast<const uint16_t*>(group.data) + place;
  return {_mm512_loadu_si512(values), _mm512_loadu_si512(values + 32)};
}

EF_BRAIN_INLINE __m256 fold(__m512 v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

// The sums of four registers' lanes.
EF_BRAIN_INLINE __m128 sum_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m256 ab = _mm256_hadd_ps(fold(a), fold(b)), cd = _mm256_hadd_ps(fold(c), fold(d));
  const __m256 all = _mm256_hadd_ps(ab, cd);
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// Four rows of W from `row` meet `rows` rows of x.
template <int32_t format, int rows>
EF_BRAIN void four_rows(const EfGroup& group, const uint16_t* x, int64_t k, int64_t row, uint16_t* y, int64_t n) {
  __m512 sums[rows][4];
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < 4; ++j) sums[r][j] = _mm512_setzero_ps();
  const int64_t place = row * k;
  constexpr int64_t kBits = format == EF_NF4 ? 4 : format == EF_INT8 ? 8 : 16;
  for (int64_t at = 0; at < k; at += kBlock) {
    for (int64_t j = 4; j < 8; ++j)
      _mm_prefetch(static_cast<const char*>(group.data) + ((place + j * k + at) * kBits >> 3), _MM_HINT_T0);
    const Pair w[4] = {decode<format>(group, place + at), decode<format>(group, place + k + at),
                       decode<format>(group, place + 2 * k + at), decode<format>(group, place + 3 * k + at)};
    for (int r = 0; r < rows; ++r) {
      const auto x0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + r * k + at));
      const auto x1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + r * k + at + 32));
      for (int j = 0; j < 4; ++j) {
        sums[r][j] = _mm512_dpbf16_ps(sums[r][j], x0, reinterpret_cast<__m512bh>(w[j].first));
        sums[r][j] = _mm512_dpbf16_ps(sums[r][j], x1, reinterpret_cast<__m512bh>(w[j].second));
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    __m128 four = sum_four(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    if (format == EF_INT8)
      four = _mm_mul_ps(four, _mm_mul_ps(_mm_loadu_ps(group.scale + row), _mm_set1_ps(kPer127)));
    const __m128i narrow = reinterpret_cast<__m128i>(_mm_cvtneps_pbh(four));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(y + r * n + row), narrow);
  }
}

// The same for NF4 where k is a number of whole steps. The code's 16 values are rounded to bfloat16, and the sum of a
// block is scaled in float32: to round each weight, as dequantizing does, takes a table for each block, which costs as
// much as the products with one row. Both err by at most 2^-9 of each weight.
template <int rows>
EF_BRAIN void four_rows_nf4(const EfGroup& group, const uint16_t* x, int64_t k, int64_t row, uint16_t* y, int64_t n) {
  __m512 sums[rows][4];
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < 4; ++j) sums[r][j] = _mm512_setzero_ps();
  const __m256i code = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(kNf4)));
  const __m512i table = _mm512_broadcast_i64x4(code);  // twice: vpermw reads five bits, the fifth does not matter
  const uint8_t* packed = static_cast<const uint8_t*>(group.data);
  const int shift = __builtin_ctz(group.blocksize);
  constexpr int64_t kAhead = 4096;  // bytes; row after row, so that memory is read as one stream
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    for (int64_t at = 0; at < k; at += kStep) {
      const int64_t place = (row + j) * k + at;
      const uint8_t* from = packed + (place >> 1);
      _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
      const __m512i words = _mm512_loadu_si512(from);
      const __m512i w[4] = {_mm512_permutexvar_epi16(words, table),
                            _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table),
                            _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table),
                            _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table)};
      // The first 64 weights are in the lower half of the words.
      const __m512 scale = _mm512_mask_broadcastss_ps(_mm512_set1_ps(group.scale[place >> shift]), 0xFF00,
                                                      _mm_load_ss(group.scale + ((place + kBlock) >> shift)));
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const uint16_t* values = x + r * k + at;
        __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_loadu_si512(values + 32 * i)),
                                 reinterpret_cast<__m512bh>(w[i]));
        sums[r][j] = _mm512_fmadd_ps(sum, scale, sums[r][j]);
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    const __m128 four = sum_four(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    const __m128i narrow = reinterpret_cast<__m128i>(_mm_cvtneps_pbh(four));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(y + r * n + row), narrow);
  }
}

EF_BRAIN void run_nf4(const EfGroup& group, const uint16_t* x, int64_t k, int64_t first, int64_t last, uint16_t* y,
                     int64_t n) {
  for (int64_t row = first; row < last; row += 4) {
    for (int64_t at = 0; at < group.row_count; at += 4) {
      const uint16_t* source = x + at * k;
      uint16_t* target = y + at * n;
      switch (group.row_count - at) {
        case 1: four_rows_nf4<1>(group, source, k, row, target, n); break;
        case 2: four_rows_nf4<2>(group, source, k, row, target, n); break;
        case 3: four_rows_nf4<3>(group, source, k, row, target, n); break;
        default: four_rows_nf4<4>(group, source, k, row, target, n);
      }
    }
  }
}

template <int32_t format>
EF_BRAIN void run_brain(const EfGroup& group, const uint16_t* x, int64_t k, int64_t first, int64_t last, uint16_t* y,
                       int64_t n) {
  for (int64_t row = first; row < last; row += 4) {
    // The four rows of W are read once from memory; for further rows of x they are in the first-level cache.
    for (int64_t at = 0; at < group.row_count; at += 4) {
      const uint16_t* source = x + at * k;
      uint16_t* target = y + at * n;
      switch (group.row_count - at) {
        case 1: four_rows<format, 1>(group, source, k, row, target, n); break;
        case 2: four_rows<format, 2>(group, source, k, row, target, n); break;
        case 3: four_rows<format, 3>(group, source, k, row, target, n); break;
        default: four_rows<format, 4>(group, source, k, row, target, n);
      }
    }
  }
}

EF_BRAIN void run_brain_any(const EfGroup& group, const uint8_t* arranged, const float*, int64_t k, int64_t first,
                           int64_t last, void* y, int32_t, int64_t n) {
  const uint16_t* x = reinterpret_cast<const uint16_t*>(arranged);
  if (group.format == EF_NF4 && k % kStep == 0)
    return run_nf4(group, x, k, first, last, static_cast<uint16_t*>(y), n);
  if (group.format == EF_NF4) return run_brain<EF_NF4>(group, x, k, first, last, static_cast<uint16_t*>(y), n);
  if (group.format == EF_INT8) return run_brain<EF_INT8>(group, x, k, first, last, static_cast<uint16_t*>(y), n);
  return run_brain<EF_BF16>(group, x, k, first, last, static_cast<uint16_t*>(y), n);
}

template <int rows>
EF_BRAIN void vnni_rows(const EfGroup& group, const uint8_t* x, const float* scales, int64_t k, int64_t row, void* y,
                       int32_t dtype, int64_t n) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sums[rows][2], weights[2];
  for (int j = 0; j < 2; ++j) {
    weights[j] = _mm512_setzero_si512();
    for (int r = 0; r < rows; ++r) sums[r][j] = _mm512_setzero_si512();
  }
  const int8_t* w = static_cast<const int8_t*>(group.data) + row * k;
  for (int64_t at = 0; at < k; at += kBlock) {
    _mm_prefetch(w + 4 * k + at, _MM_HINT_T0);
    _mm_prefetch(w + 5 * k + at, _MM_HINT_T0);
    const __m512i w0 = _mm512_loadu_si512(w + at), w1 = _mm512_loadu_si512(w + k + at);
    weights[0] = _mm512_dpbusd_epi32(weights[0], ones, w0);
    weights[1] = _mm512_dpbusd_epi32(weights[1], ones, w1);
    for (int r = 0; r < rows; ++r) {
      const __m512i bytes = _mm512_loadu_si512(x + r * k + at);
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], bytes, w0);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], bytes, w1);
    }
  }
  for (int j = 0; j < 2; ++j) {
    const int32_t shift = 128 * _mm512_reduce_add_epi32(weights[j]);
    for (int r = 0; r < rows; ++r) {
      const float whole = static_cast<float>(_mm512_reduce_add_epi32(sums[r][j]) - shift);
      const float value = whole * (group.scale[row + j] * (scales[r] * kPer127));
      if (dtype == EF_F32)
        static_cast<float*>(y)[r * n + row + j] = value;
      else
        static_cast<uint16_t*>(y)[r * n + row + j] = narrow_brain(value);
    }
  }
}

EF_BRAIN void run_vnni(const EfGroup& group, const uint8_t* arranged, const float* scales, int64_t k, int64_t first,
                      int64_t last, void* y, int32_t dtype, int64_t n) {
  const int64_t size = dtype == EF_F32 ? 4 : 2;
  for (int64_t row = first; row < last; row += 2) {
    for (int64_t at = 0; at < group.row_count; at += 4) {
      const uint8_t* x = arranged + at * k;
      void* target = static_cast<char*>(y) + at * n * size;
      switch (group.row_count - at) {
        case 1: vnni_rows<1>(group, x, scales + at, k, row, target, dtype, n); break;
        case 2: vnni_rows<2>(group, x, scales + at, k, row, target, dtype, n); break;
        case 3: vnni_rows<3>(group, x, scales + at, k, row, target, dtype, n); break;
        default: vnni_rows<4>(group, x, scales + at, k, row, target, dtype, n);
      }
    }
  }
}

}  // namespace

const RowsKernel kRowsBf16{brain_bytes, arrange_brain, run_brain_any};
const RowsKernel kRowsVnni{vnni_bytes, arrange_vnni, run_vnni};

}  // namespace edgefed
#endif
