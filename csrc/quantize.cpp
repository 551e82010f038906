// NF4 and INT8, to and from. The specification is edgefed/kernels/quantization.py: the same bits, whichever instruction
// set runs. Compiled without contraction into fused multiply-adds.
#include "masked_experts.h"
#include "parallel.h"

#include <algorithm>
#include <initializer_list>

#if EF_X86
#include <immintrin.h>
#elif EF_NEON
#include <arm_neon.h>
#endif

namespace edgefed {
namespace {

constexpr int64_t kTaskValues = 1 << 18;  // values in one task: large beside the cost of handing it out
constexpr float kPer127 = 7.874015718698502e-3f;

// --- quantize ---------------------------------------------------------------------------------------------------

// Bits of the largest magnitude. Magnitudes order as integers, and an infinity or NaN is larger than all finite ones.
template <typename T>
EF_INLINE typename T::Bits largest_bits(const typename T::Bits* values, int64_t n) {
  typename T::Bits largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const typename T::Bits magnitude = values[i] & static_cast<typename T::Bits>(~T::kSign);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

struct Nf4Bounds {
  float at[15];
  constexpr Nf4Bounds() : at() {
    for (int i = 0; i < 15; ++i) at[i] = (kNf4[i] + kNf4[i + 1]) / 2.0f;
  }
};
constexpr Nf4Bounds kBounds;

// The code of a scaled value is the number of bounds below it.
EF_INLINE void encode_nf4(const float* scaled, int64_t n, uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) {
    int32_t code = 0;
    for (int bound = 0; bound < 15; ++bound) code += scaled[i] > kBounds.at[bound];
    codes[i] = static_cast<uint8_t>(code);
  }
}

template <typename T>
EF_INLINE int64_t quantize_nf4_blocks(const typename T::Bits* values, int64_t n, int64_t blocksize, uint8_t* packed,
                                      float* absmax, int64_t first, int64_t last) {
  constexpr int64_t kPiece = 64;
  float scaled[kPiece];
  uint8_t codes[kPiece];
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * blocksize, size = std::min(blocksize, n - begin);
    const typename T::Bits largest = largest_bits<T>(values + begin, size);
    if (largest >= T::kExponent) return 1 + block;
    // A short last block is divided by its absmax, a whole one multiplied by the reciprocal: they differ in the last
    // bit, and bitsandbytes does it so.
    const bool whole = size == blocksize;
    absmax[block] = whole ? T::widen(largest) : std::max(T::widen(largest), 1e-38f);
    const float divisor = std::max(absmax[block], 1e-38f), factor = 1.0f / divisor;
    for (int64_t at = 0; at < size; at += kPiece) {
      const int64_t piece = std::min(kPiece, size - at);
      const typename T::Bits* source = values + begin + at;
      for (int64_t i = 0; i < piece; ++i) {
        const float value = T::widen(source[i]);
        const float ratio = whole ? value * factor : value / divisor;
        scaled[i] = std::min(std::max(ratio, -1.0f), 1.0f);
      }
      if (piece == kPiece) {
        encode_nf4(scaled, kPiece, codes);
      } else {
        encode_nf4(scaled, piece, codes);
        if (piece & 1) codes[piece] = 7;  // bitsandbytes pads with the code of zero
      }
      uint8_t* target = packed + (begin + at) / 2;
      for (int64_t i = 0; i < (piece + 1) / 2; ++i) target[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
    }
  }
  return EF_OK;
}

// Through half precision, as bitsandbytes' int8_vectorwise_quant(W.half()).
template <typename T>
EF_INLINE int64_t quantize_int8_rows(const typename T::Bits* values, int64_t columns, int8_t* packed, float* absmax,
                                     int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const typename T::Bits* source = values + row * columns;
    int8_t* target = packed + row * columns;
    const typename T::Bits largest = largest_bits<T>(source, columns);
    if (largest >= T::kExponent) return 1 + row;
    const uint16_t half = narrow_half(T::widen(largest));
    if (half >= Half::kExponent) return 1 + row;
    absmax[row] = widen_half(half);
    if (half == 0) {
      std::memset(target, 0, static_cast<size_t>(columns));
      continue;
    }
    const float factor = (1.0f / absmax[row]) * 127.0f;  // two roundings, as torch computes 127 / absmax
    for (int64_t i = 0; i < columns; ++i) {
      const float value = widen_half(narrow_half(T::widen(source[i]))) * factor;
      // Adding and taking away 1.5 * 2^23 rounds to nearest, ties to even.
      target[i] = static_cast<int8_t>(static_cast<int32_t>((value + 12582912.0f) - 12582912.0f));
    }
  }
  return EF_OK;
}

// --- dequantize -------------------------------------------------------------------------------------------------

// A block has 16 different values at most: they are scaled and rounded once, then looked up.
template <typename T>
EF_INLINE void scale_code(float absmax, typename T::Bits* table) {
  for (int i = 0; i < 16; ++i) table[i] = T::narrow(kNf4[i] * absmax);
}

template <typename T>
EF_INLINE void look_up(const uint8_t* packed, int64_t n, const typename T::Bits* table, typename T::Bits* out) {
  for (int64_t i = 0; i < n / 2; ++i) {
    out[2 * i] = table[packed[i] >> 4];
    out[2 * i + 1] = table[packed[i] & 15];
  }
  if (n & 1) out[n - 1] = table[packed[n / 2] >> 4];
}

#if EF_X86
// The vector forms do as many whole vectors as there are and return how many values that was.
EF_TARGET_AVX512 EF_INLINE int64_t look_up_avx512(const uint8_t* packed, int64_t n, const uint16_t* table,
                                                  uint16_t* out) {
  const __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
  alignas(64) uint16_t order[64];
  for (int i = 0; i < 32; ++i) {
    order[2 * i] = static_cast<uint16_t>(i);
    order[2 * i + 1] = static_cast<uint16_t>(32 + i);
  }
  const __m512i first = _mm512_load_si512(order), second = _mm512_load_si512(order + 32);
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + i / 2)));
    // vpermw reads five bits of an index; the table is there twice, so the fifth does not matter.
    const __m512i even = _mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), values);
    const __m512i odd = _mm512_permutexvar_epi16(pairs, values);
    _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(even, first, odd));
    _mm512_storeu_si512(out + i + 32, _mm512_permutex2var_epi16(even, second, odd));
  }
  return i;
}
EF_TARGET_AVX512 EF_INLINE int64_t look_up_avx512(const uint8_t* packed, int64_t n, const uint32_t* table,
                                                  uint32_t* out) {
  const __m512i values = _mm512_loadu_si512(table);
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2)));
    const __m512i even = _mm512_permutexvar_epi32(_mm512_srli_epi32(pairs, 4), values);
    const __m512i odd = _mm512_permutexvar_epi32(pairs, values);
    _mm512_storeu_si512(out + i, _mm512_permutex2var_epi32(even, first, odd));
    _mm512_storeu_si512(out + i + 16, _mm512_permutex2var_epi32(even, second, odd));
  }
  return i;
}
// Low and high bytes of the values are two tables of 16 bytes, which is what vpshufb looks up.
EF_TARGET_AVX2 EF_INLINE int64_t look_up_avx2(const uint8_t* packed, int64_t n, const uint16_t* table, uint16_t* out) {
  alignas(16) uint8_t bytes[2][16];
  for (int i = 0; i < 16; ++i) {
    bytes[0][i] = static_cast<uint8_t>(table[i]);
    bytes[1][i] = static_cast<uint8_t>(table[i] >> 8);
  }
  const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[0]));
  const __m128i high = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[1]));
  const __m128i mask = _mm_set1_epi8(15);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
    const __m128i even = _mm_and_si128(_mm_srli_epi16(pairs, 4), mask), odd = _mm_and_si128(pairs, mask);
    const __m128i codes[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
    for (int half = 0; half < 2; ++half) {
      const __m128i l = _mm_shuffle_epi8(low, codes[half]), h = _mm_shuffle_epi8(high, codes[half]);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i + 16 * half), _mm_unpacklo_epi8(l, h));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i + 16 * half + 8), _mm_unpackhi_epi8(l, h));
    }
  }
  return i;
}
EF_TARGET_AVX2 EF_INLINE int64_t look_up_avx2(const uint8_t* packed, int64_t n, const uint32_t* table, uint32_t* out) {
  const __m256 below = _mm256_loadu_ps(reinterpret_cast<const float*>(table));
  const __m256 above = _mm256_loadu_ps(reinterpret_cast<const float*>(table + 8));
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i / 2));
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i codes =
        _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(pairs, 4), mask), _mm_and_si128(pairs, mask));
    for (int half = 0; half < 2; ++half) {
      const __m256i code = _mm256_cvtepu8_epi32(half ? _mm_srli_si128(codes, 8) : codes);
      const __m256 choose = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));  // bit 3 to the sign
      const __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, code),
                                            _mm256_permutevar8x32_ps(above, code), choose);
      _mm256_storeu_ps(reinterpret_cast<float*>(out + i + 8 * half), value);
    }
  }
  return i;
}
#endif
#if EF_NEON
EF_INLINE int64_t look_up_neon(const uint8_t* packed, int64_t n, const uint16_t* table, uint16_t* out) {
  uint8_t bytes[2][16];
  for (int i = 0; i < 16; ++i) {
    bytes[0][i] = static_cast<uint8_t>(table[i]);
    bytes[1][i] = static_cast<uint8_t>(table[i] >> 8);
  }
  const uint8x16_t low = vld1q_u8(bytes[0]), high = vld1q_u8(bytes[1]);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const uint8x16_t pairs = vld1q_u8(packed + i / 2);
    const uint8x16_t even = vshrq_n_u8(pairs, 4), odd = vandq_u8(pairs, vdupq_n_u8(15));
    const uint8x16_t codes[2] = {vzip1q_u8(even, odd), vzip2q_u8(even, odd)};
    for (int half = 0; half < 2; ++half) {
      const uint8x16x2_t planes = {{vqtbl1q_u8(low, codes[half]), vqtbl1q_u8(high, codes[half])}};
      vst2q_u8(reinterpret_cast<uint8_t*>(out + i + 16 * half), planes);
    }
  }
  return i;
}
EF_INLINE int64_t look_up_neon(const uint8_t* packed, int64_t n, const uint32_t* table, uint32_t* out) {
  uint8_t bytes[4][16];
  for (int i = 0; i < 16; ++i)
    for (int plane = 0; plane < 4; ++plane) bytes[plane][i] = static_cast<uint8_t>(table[i] >> (8 * plane));
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const uint8x16_t pairs = vld1q_u8(packed + i / 2);
    const uint8x16_t even = vshrq_n_u8(pairs, 4), odd = vandq_u8(pairs, vdupq_n_u8(15));
    const uint8x16_t codes[2] = {vzip1q_u8(even, odd), vzip2q_u8(even, odd)};
    for (int half = 0; half < 2; ++half) {
      uint8x16x4_t planes;
      for (int plane = 0; plane < 4; ++plane) planes.val[plane] = vqtbl1q_u8(vld1q_u8(bytes[plane]), codes[half]);
      vst4q_u8(reinterpret_cast<uint8_t*>(out + i + 16 * half), planes);
    }
  }
  return i;
}
#endif

template <typename Bits>
EF_INLINE int64_t look_up_scalar(const uint8_t*, int64_t, const Bits*, Bits*) {
  return 0;
}

template <typename T>
EF_INLINE void dequantize_int8_rows(const int8_t* packed, const float* absmax, int64_t columns, typename T::Bits* out,
                                    int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float scale = absmax[row];
    const int8_t* source = packed + row * columns;
    typename T::Bits* target = out + row * columns;
    for (int64_t i = 0; i < columns; ++i) target[i] = T::narrow(static_cast<float>(source[i]) * scale * kPer127);
  }
}

// --- one instance for each instruction set ----------------------------------------------------------------------

template <typename T>
struct Functions {
  using Bits = typename T::Bits;
  int64_t (*quantize_nf4)(const Bits*, int64_t, int64_t, uint8_t*, float*, int64_t, int64_t);
  int64_t (*quantize_int8)(const Bits*, int64_t, int8_t*, float*, int64_t, int64_t);
  void (*dequantize_nf4)(const uint8_t*, const float*, int64_t, int64_t, Bits*, int64_t, int64_t);
  void (*dequantize_int8)(const int8_t*, const float*, int64_t, Bits*, int64_t, int64_t);
};

#define EF_INSTANCE(name, target, look_up_some)                                                                       \
  template <typename T>                                                                                               \
  struct name {                                                                                                       \
    using Bits = typename T::Bits;                                                                                    \
    target static int64_t quantize_nf4(const Bits* values, int64_t n, int64_t blocksize, uint8_t* packed,             \
                                       float* absmax, int64_t first, int64_t last) {                                  \
      return blocksize == 64 ? quantize_nf4_blocks<T>(values, n, 64, packed, absmax, first, last)                     \
                             : quantize_nf4_blocks<T>(values, n, blocksize, packed, absmax, first, last);             \
    }                                                                                                                 \
    target static int64_t quantize_int8(const Bits* values, int64_t columns, int8_t* packed, float* absmax,           \
                                        int64_t first, int64_t last) {                                                \
      return quantize_int8_rows<T>(values, columns, packed, absmax, first, last);                                     \
    }                                                                                                                 \
    target static void dequantize_nf4(const uint8_t* packed, const float* absmax, int64_t n, int64_t blocksize,       \
                                      Bits* out, int64_t first, int64_t last) {                                       \
      for (int64_t block = first; block < last; ++block) {                                                            \
        const int64_t begin = block * blocksize, size = std::min(blocksize, n - begin);                               \
        alignas(64) Bits table[16];                                                                                   \
        scale_code<T>(absmax[block], table);                                                                          \
        const int64_t done = look_up_some(packed + begin / 2, size, table, out + begin);                              \
        look_up<T>(packed + (begin + done) / 2, size - done, table, out + begin + done);                              \
      }                                                                                                               \
    }                                                                                                                 \
    target static void dequantize_int8(const int8_t* packed, const float* absmax, int64_t columns, Bits* out,         \
                                       int64_t first, int64_t last) {                                                 \
      dequantize_int8_rows<T>(packed, absmax, columns, out, first, last);                                             \
    }                                                                                                                 \
    static constexpr Functions<T> all{quantize_nf4, quantize_int8, dequantize_nf4, dequantize_int8};                  \
  };

EF_INSTANCE(Scalar, , look_up_scalar)
#if EF_X86
EF_INSTANCE(Avx2, EF_TARGET_AVX2, look_up_avx2)
EF_INSTANCE(Avx512, EF_TARGET_AVX512, look_up_avx512)
#elif EF_NEON
EF_INSTANCE(Neon, , look_up_neon)
#endif

template <typename T>
const Functions<T>* functions_of(int32_t requested) {
  switch (choose_isa(requested)) {
    case EF_ISA_SCALAR: return &Scalar<T>::all;
#if EF_X86
    case EF_ISA_AVX2: return &Avx2<T>::all;
    case EF_ISA_AVX512:
    case EF_ISA_AVX512_BF16:
    case EF_ISA_AMX: return &Avx512<T>::all;
#elif EF_NEON
    case EF_ISA_NEON: return &Neon<T>::all;
#endif
    default: return nullptr;
  }
}

// Runs body(first, last) over `count` items of `size` values each; returns the first error in the order of the items.
template <typename Body>
int64_t over_items(int64_t count, int64_t size, int32_t threads, Body body) {
  const int64_t step = std::max<int64_t>(1, kTaskValues / std::max<int64_t>(1, size));
  const int64_t tasks = (count + step - 1) / step;
  int64_t* errors = static_cast<int64_t*>(scratch(0, static_cast<size_t>(tasks + 1) * sizeof(int64_t)));
  if (errors == nullptr) return EF_NO_MEMORY;
  parallel(tasks, threads, [&](int64_t task) {
    errors[task] = body(task * step, std::min(count, (task + 1) * step));
  });
  for (int64_t task = 0; task < tasks; ++task)
    if (errors[task] != EF_OK) return errors[task];
  return EF_OK;
}

}  // namespace
}  // namespace edgefed

using namespace edgefed;

extern "C" {

int64_t ef_quantize_nf4(const void* values, int32_t dtype, int64_t n, int64_t blocksize, uint8_t* packed, float* absmax,
                        int32_t isa, int32_t threads) {
  return with_dtype(dtype, [&](auto type) -> int64_t {
    using T = decltype(type);
    const Functions<T>* run = functions_of<T>(isa);
    if (run == nullptr || blocksize < 2 || blocksize % 2) return EF_UNSUPPORTED;
    return over_items((n + blocksize - 1) / blocksize, blocksize, threads, [&](int64_t first, int64_t last) {
      return run->quantize_nf4(static_cast<const typename T::Bits*>(values), n, blocksize, packed, absmax, first, last);
    });
  });
}

int64_t ef_quantize_int8(const void* values, int32_t dtype, int64_t rows, int64_t columns, int8_t* packed,
                         float* absmax, int32_t isa, int32_t threads) {
  return with_dtype(dtype, [&](auto type) -> int64_t {
    using T = decltype(type);
    const Functions<T>* run = functions_of<T>(isa);
    if (run == nullptr) return EF_UNSUPPORTED;
    return over_items(rows, columns, threads, [&](int64_t first, int64_t last) {
      return run->quantize_int8(static_cast<const typename T::Bits*>(values), columns, packed, absmax, first, last);
    });
  });
}

int64_t ef_dequantize_nf4(const uint8_t* packed, const float* absmax, int64_t n, int64_t blocksize, void* out,
                          int32_t dtype, int32_t isa, int32_t threads) {
  return with_dtype(dtype, [&](auto type) -> int64_t {
    using T = decltype(type);
    const Functions<T>* run = functions_of<T>(isa);
    if (run == nullptr || blocksize < 2 || blocksize % 2) return EF_UNSUPPORTED;
    return over_items((n + blocksize - 1) / blocksize, blocksize, threads, [&](int64_t first, int64_t last) -> int64_t {
      run->dequantize_nf4(packed, absmax, n, blocksize, static_cast<typename T::Bits*>(out), first, last);
      return EF_OK;
    });
  });
}

int64_t ef_dequantize_int8(const int8_t* packed, const float* absmax, int64_t rows, int64_t columns, void* out,
                           int32_t dtype, int32_t isa, int32_t threads) {
  return with_dtype(dtype, [&](auto type) -> int64_t {
    using T = decltype(type);
    const Functions<T>* run = functions_of<T>(isa);
    if (run == nullptr) return EF_UNSUPPORTED;
    return over_items(rows, columns, threads, [&](int64_t first, int64_t last) -> int64_t {
      run->dequantize_int8(packed, absmax, columns, static_cast<typename T::Bits*>(out), first, last);
      return EF_OK;
    });
  });
}

int64_t ef_unnest_scales(const uint8_t* codes, const float* absmax, const float* mean, const float* values,
                         int64_t experts, int64_t blocks, int64_t blocksize, float* out, int32_t threads) {
  const int64_t pieces = (blocks + blocksize - 1) / blocksize;
  parallel(experts * pieces, experts * blocks > (1 << 14) ? threads : 1, [&](int64_t task) {
    const int64_t expert = task / pieces, piece = task % pieces;
    const int64_t first = expert * blocks + piece * blocksize;
    const int64_t last = expert * blocks + std::min(blocks, (piece + 1) * blocksize);
    for (int64_t i = first; i < last; ++i) out[i] = values[codes[i]] * absmax[task] + mean[expert];
  });
  return EF_OK;
}

int32_t ef_has_isa(int32_t isa) {
#if EF_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case EF_ISA_AVX2: return avx2;
    case EF_ISA_AVX512: return avx512;
    case EF_ISA_AVX512_BF16:
    case EF_ISA_AMX:
      if (!avx512 || !__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bf16")) return 0;
      return isa == EF_ISA_AVX512_BF16 || has_amx();
    default: break;
  }
#elif EF_NEON
  if (isa == EF_ISA_NEON) return 1;
#endif
  return isa == EF_ISA_SCALAR;
}

int32_t ef_best_isa(void) {
  for (const int32_t isa : {EF_ISA_NEON, EF_ISA_AMX, EF_ISA_AVX512_BF16, EF_ISA_AVX512, EF_ISA_AVX2})
    if (ef_has_isa(isa)) return isa;
  return EF_ISA_SCALAR;
}

}  // extern "C"
