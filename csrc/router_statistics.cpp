// The record of a layer's routing in one pass over its router's numbers. The specification is
// edgefed/kernels/router_statistics.py; sums agree to a few float32 roundings of each term.
#include <algorithm>

#if defined(__GNUC__) && !defined(__clang__)
// Comparisons of floats become selections in vectors only when they are not assumed to trap.
#pragma GCC optimize("no-trapping-math")
#endif

#include "parallel.h"
#include "vector_math.h"

#if EF_X86
#include <immintrin.h>
#endif

namespace edgefed {
namespace {

constexpr int64_t kBlockTokens = 16;     // float32 partial sums; blocks are added in float64
constexpr int64_t kPieceTokens = 128;    // of a task
enum Row { kTokens, kGate, kLargest, kLog, kComplementLog, kRouted, kRows };

constexpr int kLanes = 16;  // partial results: a reduction to one number would be done one element after the other

EF_INLINE float sum_of(const float* values, int64_t n) {
  float lanes[kLanes] = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t at = 0; at < whole; at += kLanes)
    for (int i = 0; i < kLanes; ++i) lanes[i] += values[at + i];
  for (int64_t at = whole; at < n; ++at) lanes[at - whole] += values[at];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

EF_INLINE float largest_of(const float* values, int64_t n) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = values[0];
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t at = 0; at < whole; at += kLanes)
    for (int i = 0; i < kLanes; ++i) lanes[i] = larger(lanes[i], values[at + i]);
  for (int64_t at = whole; at < n; ++at) lanes[at - whole] = larger(lanes[at - whole], values[at]);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = larger(lanes[i], lanes[i + width]);
  return lanes[0];
}

// One token's router numbers to probabilities and their logarithms (of at least the smallest normal number: below it
// g ln g is less than 1e-36).
template <typename T>
EF_INLINE void gate_of(const typename T::Bits* router, int64_t experts, int32_t kind, float* __restrict gate,
                       float* __restrict logs) {
  for (int64_t e = 0; e < experts; ++e) gate[e] = T::widen(router[e]);
  if (kind == EF_SOFTMAX) {  // its logarithm needs no logarithm
    const float largest = largest_of(gate, experts);
    for (int64_t e = 0; e < experts; ++e) {
      logs[e] = larger(gate[e] - largest, -3.4e38f);  // logits may be -inf; their g ln g is 0
      gate[e] = exponential(logs[e]);
    }
    const float total = sum_of(gate, experts), factor = 1.0f / total, shift = natural_log(total);
    for (int64_t e = 0; e < experts; ++e) {
      gate[e] *= factor;
      logs[e] -= shift;
    }
    return;
  }
  if (kind == EF_SIGMOID) {
    for (int64_t e = 0; e < experts; ++e) gate[e] = 1.0f / (1.0f + exponential(smaller(-gate[e], 87.3f)));
    const float factor = 1.0f / larger(sum_of(gate, experts), kSmallest);
    for (int64_t e = 0; e < experts; ++e) gate[e] *= factor;
  }
  for (int64_t e = 0; e < experts; ++e) logs[e] = natural_log(larger(gate[e], kSmallest));
}

template <typename T>
EF_INLINE void add_tokens(double* statistics, const typename T::Bits* router, int32_t kind, int64_t experts,
                          int64_t first, int64_t last, float* buffer) {
  float* gate = buffer;
  float* logs_of_gate = buffer + experts;
  float* sums = buffer + 2 * experts;  // gate, its logarithm's and its complement's term, and the largest
  for (int64_t block = first; block < last; block += kBlockTokens) {
    std::fill(sums, sums + 4 * experts, 0.0f);
    const int64_t end = std::min(last, block + kBlockTokens);
    for (int64_t token = block; token < end; ++token) {
      gate_of<T>(router + token * experts, experts, kind, gate, logs_of_gate);
      float* __restrict total = sums;
      float* __restrict logs = sums + experts;
      float* __restrict complements = sums + 2 * experts;
      float* __restrict largest = sums + 3 * experts;
      const float* __restrict g = gate;
      const float* __restrict log = logs_of_gate;
#pragma GCC ivdep
      for (int64_t e = 0; e < experts; ++e) {
        // A normalized sigmoid may pass 1 by one bit.
        const float at_most_1 = smaller(g[e], 1.0f), rest = 1.0f - at_most_1;
        const float log_rest = natural_log(larger(rest, kSmallest));
        // ln(1 - g) = ln(rest) - error / rest, where 1 - g was rounded to rest = 1 - g + error.
        const float error = (rest - 1.0f) + at_most_1;
        total[e] += g[e];
        logs[e] += g[e] * log[e];
        complements[e] += rest * log_rest - error;
        largest[e] = g[e] > largest[e] ? g[e] : largest[e];
      }
    }
    for (int64_t e = 0; e < experts; ++e) {
      statistics[kGate * experts + e] += sums[e];
      statistics[kLog * experts + e] += sums[experts + e];
      statistics[kComplementLog * experts + e] += sums[2 * experts + e];
      statistics[kLargest * experts + e] = std::max(statistics[kLargest * experts + e], double{sums[3 * experts + e]});
    }
  }
}

#if EF_X86
// The same with AVX-512: 16 experts at a time, their sums over a block in registers, and a logarithm by a table. Logits
// become probabilities and logarithms in the buffer first; in it, experts are filled up to a multiple of 16 with gates
// of zero, which add nothing.
namespace wide {

#define EF_WIDE EF_TARGET_AVX512
#define EF_WIDE_INLINE EF_TARGET_AVX512 EF_INLINE

// ln x = k ln 2 + ln c + ln(1 + r) for x = 2^k m, m in [0.699, 1.398), c near m, r = m / c - 1, |r| < 0.03. In the
// interval around 1 the table says c = 1, so that small logarithms keep their relative precision. The polynomial is
// fitted to (ln(1 + r) - r) / r^2: 3e-8 of the logarithm.
constexpr uint32_t kFirst = 0x3F330000u;
alignas(64) constexpr float kInverse[16] = {
    1.3989070653915405f, 1.3403141498565674f, 1.286432147026062f,  1.2367149591445923f,
    1.1906976699829102f, 1.147982120513916f,  1.1082251071929932f, 1.0711296796798706f,
    1.0364372730255127f, 1.0f,                0.9481481313705444f, 0.8951048851013184f,
    0.8476821184158325f, 0.805031418800354f,  0.7664670944213867f, 0.7314285635948181f};
alignas(64) constexpr float kLogOf[16] = {
    -0.33569127321243286f, -0.2929040193557739f, -0.25187259912490845f, -0.21245864033699036f,
    -0.17453941702842712f, -0.13800571858882904f, -0.10275973379611969f, -0.06871386617422104f,
    -0.0357891321182251f,  0.0f,                  0.05324453115463257f,  0.11081437766551971f,
    0.16524957120418549f,  0.21687397360801697f,  0.26596352458000183f,  0.3127557337284088f};

EF_WIDE_INLINE __m512 natural_log(__m512 x) {  // of positive, normal numbers
  const __m512i bits = _mm512_castps_si512(x), from = _mm512_sub_epi32(bits, _mm512_set1_epi32(kFirst));
  const __m512i place = _mm512_srli_epi32(from, 19);  // its last four bits choose
  const __m512 k = _mm512_cvtepi32_ps(_mm512_srai_epi32(from, 23));
  const __m512i whole = _mm512_and_si512(from, _mm512_set1_epi32(static_cast<int>(0xFF800000u)));
  const __m512 m = _mm512_castsi512_ps(_mm512_sub_epi32(bits, whole));
  const __m512 inverse = _mm512_permutexvar_ps(place, _mm512_load_ps(kInverse));
  const __m512 r = _mm512_fmsub_ps(m, inverse, _mm512_set1_ps(1.0f));
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(-0.2502070665359497f), _mm512_set1_ps(0.3334788680076599f));
  p = _mm512_fmadd_ps(r, p, _mm512_set1_ps(-0.4999999403953552f));
  const __m512 rest = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r);
  const __m512 log_of = _mm512_permutexvar_ps(place, _mm512_load_ps(kLogOf));
  return _mm512_add_ps(_mm512_fmadd_ps(k, _mm512_set1_ps(0.693147180559945f), log_of), rest);
}

EF_WIDE_INLINE __m512 exponential(__m512 x) {  // as the one of vector_math.h, for x <= 0
  const __m512 clamped = _mm512_max_ps(x, _mm512_set1_ps(-87.3f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(clamped, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), clamped);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  const __m512 y = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0f));
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_GE_OQ);
  return _mm512_maskz_scalef_ps(counts, y, n);
}

template <typename T>
EF_WIDE_INLINE __m512 widen(const typename T::Bits* at, __mmask16 valid) {
  if constexpr (sizeof(typename T::Bits) == 4) return _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(valid, at));
  const __m256i half = _mm256_maskz_loadu_epi16(valid, at);
  if constexpr (T::kExponent == Half::kExponent) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

EF_INLINE __mmask16 valid_of(int64_t experts, int64_t e) {
  return static_cast<__mmask16>(experts - e >= 16 ? 0xFFFF : (1 << (experts - e)) - 1);
}

// One token's logits to probabilities and, for softmax, their logarithms.
template <typename T>
EF_WIDE_INLINE void gate_of(const typename T::Bits* router, int64_t experts, bool softmax, float* gate, float* logs) {
  __m512 total = _mm512_setzero_ps();
  if (softmax) {
    const __m512 lowest = _mm512_set1_ps(-3.4e38f);
    __m512 largest = lowest;
    for (int64_t e = 0; e < experts; e += 16) {
      const __mmask16 valid = valid_of(experts, e);
      largest = _mm512_mask_max_ps(largest, valid, largest, widen<T>(router + e, valid));
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (int64_t e = 0; e < experts; e += 16) {
      const __mmask16 valid = valid_of(experts, e);
      // Logits may be -inf; their g ln g is to be 0, as of the experts that fill up.
      const __m512 logits = _mm512_mask_mov_ps(lowest, valid, widen<T>(router + e, valid));
      const __m512 log = _mm512_max_ps(_mm512_sub_ps(logits, top), lowest);
      const __m512 g = exponential(log);
      _mm512_store_ps(logs + e, _mm512_maskz_mov_ps(valid, log));
      _mm512_store_ps(gate + e, g);
      total = _mm512_add_ps(total, g);
    }
  } else {
    for (int64_t e = 0; e < experts; e += 16) {
      const __mmask16 valid = valid_of(experts, e);
      // 1 / (1 + exp(-x)) = exp(min(x, 0)) / (1 + exp(-|x|))
      const __m512 x = widen<T>(router + e, valid), below = exponential(_mm512_min_ps(x, _mm512_setzero_ps()));
      const __m512 minus = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x));
      const __m512 g = _mm512_maskz_div_ps(valid, below, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(minus)));
      _mm512_store_ps(gate + e, g);
      total = _mm512_add_ps(total, g);
    }
  }
  const float sum = larger(_mm512_reduce_add_ps(total), kSmallest);
  const __m512 factor = _mm512_set1_ps(1.0f / sum), shift = _mm512_set1_ps(edgefed::natural_log(sum));
  for (int64_t e = 0; e < experts; e += 16) {
    _mm512_store_ps(gate + e, _mm512_mul_ps(_mm512_load_ps(gate + e), factor));
    if (softmax) _mm512_store_ps(logs + e, _mm512_sub_ps(_mm512_load_ps(logs + e), shift));
  }
}

EF_WIDE_INLINE void add_to(double* at, __m512 sums, __mmask16 valid) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(sums));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(sums, 1));
  const __mmask8 first = static_cast<__mmask8>(valid), second = static_cast<__mmask8>(valid >> 8);
  _mm512_mask_storeu_pd(at, first, _mm512_add_pd(_mm512_maskz_loadu_pd(first, at), low));
  _mm512_mask_storeu_pd(at + 8, second, _mm512_add_pd(_mm512_maskz_loadu_pd(second, at + 8), high));
}

EF_WIDE_INLINE void largest_to(double* at, __m512 values, __mmask16 valid) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(values));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(values, 1));
  const __mmask8 first = static_cast<__mmask8>(valid), second = static_cast<__mmask8>(valid >> 8);
  _mm512_mask_storeu_pd(at, first, _mm512_max_pd(_mm512_maskz_loadu_pd(first, at), low));
  _mm512_mask_storeu_pd(at + 8, second, _mm512_max_pd(_mm512_maskz_loadu_pd(second, at + 8), high));
}

template <typename T>
EF_WIDE void add_tokens(double* statistics, const typename T::Bits* router, int32_t kind, int64_t experts,
                        int64_t first, int64_t last, float* buffer) {
  const int64_t width = (experts + 15) / 16 * 16;
  float* gates = buffer;
  float* logs = buffer + kBlockTokens * width;
  const bool given = kind == EF_PROBABILITY;
  for (int64_t block = first; block < last; block += kBlockTokens) {
    const int64_t count = std::min(last - block, kBlockTokens);
    const typename T::Bits* rows = router + block * experts;
    for (int64_t t = 0; t < count && !given; ++t)
      gate_of<T>(rows + t * experts, experts, kind == EF_SOFTMAX, gates + t * width, logs + t * width);
    for (int64_t e = 0; e < experts; e += 16) {
      const __mmask16 valid = valid_of(experts, e);
      const __m512 one = _mm512_set1_ps(1.0f), smallest = _mm512_set1_ps(kSmallest);
      __m512 total = _mm512_setzero_ps(), of_logs = total, of_complements = total, largest = total;
      for (int64_t t = 0; t < count; ++t) {
        const __m512 g = given ? widen<T>(rows + t * experts + e, valid) : _mm512_load_ps(gates + t * width + e);
        const __m512 log = kind == EF_SOFTMAX ? _mm512_load_ps(logs + t * width + e)
                                              : natural_log(_mm512_max_ps(g, smallest));
        // A normalized sigmoid may pass 1 by one bit. The rest is as in the other form below.
        const __m512 at_most_1 = _mm512_min_ps(g, one), rest = _mm512_sub_ps(one, at_most_1);
        const __m512 log_rest = natural_log(_mm512_max_ps(rest, smallest));
        const __m512 error = _mm512_add_ps(_mm512_sub_ps(rest, one), at_most_1);
        total = _mm512_add_ps(total, g);
        of_logs = _mm512_fmadd_ps(g, log, of_logs);
        of_complements = _mm512_add_ps(of_complements, _mm512_fmsub_ps(rest, log_rest, error));
        largest = _mm512_max_ps(largest, g);
      }
      add_to(statistics + kGate * experts + e, total, valid);
      add_to(statistics + kLog * experts + e, of_logs, valid);
      add_to(statistics + kComplementLog * experts + e, of_complements, valid);
      largest_to(statistics + kLargest * experts + e, largest, valid);
    }
  }
}

}  // namespace wide
#endif

template <typename T>
using AddTokens = void (*)(double*, const typename T::Bits*, int32_t, int64_t, int64_t, int64_t, float*);

#define EF_INSTANCE(name, target)                                                                                     \
  template <typename T>                                                                                               \
  target void name(double* statistics, const typename T::Bits* router, int32_t kind, int64_t experts, int64_t first,  \
                   int64_t last, float* buffer) {                                                                     \
    add_tokens<T>(statistics, router, kind, experts, first, last, buffer);                                            \
  }

EF_INSTANCE(add_scalar, )
#if EF_X86
EF_INSTANCE(add_avx2, EF_TARGET_AVX2)
#endif

// Clears `sums` and sets its rows of counts and weights. `pairs` (E, 2) is work space: both numbers of an expert lie
// together, one addition for both. Returns 1 where an index is no expert, else 0.
template <typename W>
double count_pairs(const int64_t* indices, const typename W::Bits* weights, int64_t count, int64_t experts,
                   double* sums, double* pairs) {
  std::fill(sums, sums + kRows * experts, 0.0);
  std::fill(pairs, pairs + 2 * experts, 0.0);
  for (int64_t i = 0; i < count; ++i) {
    if (static_cast<uint64_t>(indices[i]) >= static_cast<uint64_t>(experts)) return 1;
    double* pair = pairs + 2 * indices[i];
    pair[0] += 1.0;
    pair[1] += W::widen(weights[i]);
  }
  for (int64_t e = 0; e < experts; ++e) {
    sums[kTokens * experts + e] = pairs[2 * e];
    sums[kRouted * experts + e] = pairs[2 * e + 1];
  }
  return 0;
}

template <typename T>
AddTokens<T> instance_of(int32_t requested) {
  switch (choose_isa(requested)) {
    case EF_ISA_SCALAR:
    case EF_ISA_NEON: return add_scalar<T>;  // NEON is part of the base of aarch64
#if EF_X86
    case EF_ISA_AVX2: return add_avx2<T>;
    case EF_ISA_AVX512:
    case EF_ISA_AVX512_BF16:
    case EF_ISA_AMX: return wide::add_tokens<T>;
#endif
    default: return nullptr;
  }
}

}  // namespace
}  // namespace edgefed

using namespace edgefed;

extern "C" int64_t ef_router_statistics(double* statistics, const void* router, int32_t router_dtype, int32_t kind,
                                        const int64_t* indices, const void* weights, int32_t weights_dtype,
                                        int64_t tokens, int64_t experts, int64_t top_k, int32_t isa, int32_t threads) {
  return with_dtype(router_dtype, [&](auto router_type) -> int64_t {
    using T = decltype(router_type);
    const AddTokens<T> add = instance_of<T>(isa);
    if (add == nullptr) return EF_UNSUPPORTED;
    return with_dtype(weights_dtype, [&](auto weights_type) -> int64_t {
      using W = decltype(weights_type);
      // Each piece sums for itself; the pieces are added in their order, whatever thread ran them.
      const int64_t pieces = (tokens + kPieceTokens - 1) / kPieceTokens;
      const int64_t own = kRows * experts, width = (experts + 15) / 16 * 16;
      // Sums, pairs, at a multiple of 64 bytes the buffer of `add`, and last whether an index was wrong.
      const int64_t size = (own + 2 * experts + kBlockTokens * width + 8 + 7) / 8 * 8;
      auto* sums = static_cast<double*>(scratch(0, static_cast<size_t>(pieces * size + 8) * sizeof(double)));
      if (sums == nullptr) return EF_NO_MEMORY;
      parallel(pieces, threads, [&](int64_t piece) {
        double* mine = sums + piece * size;
        const int64_t first = piece * kPieceTokens, last = std::min(tokens, first + kPieceTokens);
        const auto* own_weights = static_cast<const typename W::Bits*>(weights) + first * top_k;
        mine[size - 1] = count_pairs<W>(indices + first * top_k, own_weights, (last - first) * top_k, experts, mine,
                                        mine + own);
        add(mine, static_cast<const typename T::Bits*>(router), kind, experts, first, last,
            reinterpret_cast<float*>(mine + (own + 2 * experts + 7) / 8 * 8));
      });
      for (int64_t piece = 0; piece < pieces; ++piece)
        if (sums[piece * size + size - 1] != 0) return EF_BAD_INDEX;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const double* mine = sums + piece * size;
        for (int64_t i = 0; i < own; ++i) {
          if (i == kLargest * experts)
            for (; i < (kLargest + 1) * experts; ++i) statistics[i] = std::max(statistics[i], mine[i]);
          statistics[i] += mine[i];
        }
      }
      return EF_OK;
    });
  });
}
