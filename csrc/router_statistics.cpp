// The record of a layer's routing in one pass over its router's numbers. The specification is
// edgefed/kernels/router_statistics.py; sums agree to a few float32 roundings of each term.
#include <algorithm>

#if defined(__GNUC__) && !defined(__clang__)
// Comparisons of floats become selections in vectors only when they are not assumed to trap.
#pragma GCC optimize("no-trapping-math")
#endif

#include "parallel.h"
#include "vector_math.h"

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
      logs[e] = gate[e] - largest;
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
        // A normalised sigmoid may pass 1 by one bit.
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
EF_INSTANCE(add_avx512, EF_TARGET_AVX512)
#endif

template <typename T>
AddTokens<T> instance_of(int32_t wish) {
  switch (choose_isa(wish)) {
    case EF_ISA_SCALAR:
    case EF_ISA_NEON: return add_scalar<T>;  // NEON is part of the base of aarch64
#if EF_X86
    case EF_ISA_AVX2: return add_avx2<T>;
    case EF_ISA_AVX512:
    case EF_ISA_AVX512_BF16: return add_avx512<T>;
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
  uint64_t outside = 0;
  for (int64_t i = 0; i < tokens * top_k; ++i)
    outside |= static_cast<uint64_t>(indices[i] < 0) | static_cast<uint64_t>(indices[i] >= experts);
  if (outside) return EF_BAD_INDEX;
  return with_dtype(router_dtype, [&](auto router_type) -> int64_t {
    using T = decltype(router_type);
    const AddTokens<T> add = instance_of<T>(isa);
    if (add == nullptr) return EF_UNSUPPORTED;
    return with_dtype(weights_dtype, [&](auto weights_type) -> int64_t {
      using W = decltype(weights_type);
      // Each piece sums for itself; the pieces are added in their order, whatever thread ran them.
      const int64_t pieces = (tokens + kPieceTokens - 1) / kPieceTokens;
      const int64_t own = kRows * experts, size = own + 3 * experts;
      auto* sums = static_cast<double*>(scratch(0, static_cast<size_t>(pieces * size + 8) * sizeof(double)));
      if (sums == nullptr) return EF_NO_MEMORY;
      parallel(pieces, threads, [&](int64_t piece) {
        double* mine = sums + piece * size;
        std::fill(mine, mine + own, 0.0);
        const int64_t first = piece * kPieceTokens, last = std::min(tokens, first + kPieceTokens);
        add(mine, static_cast<const typename T::Bits*>(router), kind, experts, first, last,
            reinterpret_cast<float*>(mine + own));
        for (int64_t i = first * top_k; i < last * top_k; ++i) {
          mine[kTokens * experts + indices[i]] += 1.0;
          mine[kRouted * experts + indices[i]] += W::widen(static_cast<const typename W::Bits*>(weights)[i]);
        }
      });
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const double* mine = sums + piece * size;
        for (int64_t i = 0; i < own; ++i)
          statistics[i] = i / experts == kLargest ? std::max(statistics[i], mine[i]) : statistics[i] + mine[i];
      }
      return EF_OK;
    });
  });
}
