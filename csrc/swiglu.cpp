// silu(gate) * value of rows (gate, value), and its gradient together with that of the gate weights: one pass over the
// rows where separate operations take many. Arithmetic in float32, one rounding at the end.
#include <algorithm>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif

#include "parallel.h"
#include "vector_math.h"

namespace edgefed {
namespace {

constexpr int64_t kPiece = 256;  // values at a time, in the first-level cache
constexpr int64_t kRowsOfTask = 16;

EF_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(smaller(-x, 87.3f))); }

template <typename T>
EF_INLINE void forward_row(const typename T::Bits* __restrict up, typename T::Bits* __restrict act, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    const float gate = T::widen(up[i]);
    act[i] = T::narrow(gate * sigmoid(gate) * T::widen(up[width + i]));
  }
}

// d: gradient of act before it is multiplied with the pair's weight. Returns d . act, the gradient of that weight.
template <typename T>
EF_INLINE float backward_row(const typename T::Bits* __restrict up, const typename T::Bits* __restrict d, float weight,
                             typename T::Bits* __restrict act, typename T::Bits* __restrict d_up, int64_t width) {
  float total = 0.0f, products[kPiece];
  for (int64_t at = 0; at < width; at += kPiece) {
    const int64_t piece = std::min(kPiece, width - at);
    for (int64_t i = 0; i < piece; ++i) {
      const float gate = T::widen(up[at + i]), value = T::widen(up[width + at + i]), share = sigmoid(gate);
      const float silu = gate * share, result = silu * value, upper = T::widen(d[at + i]);
      products[i] = upper * result;
      act[at + i] = T::narrow(result);
      d_up[at + i] = T::narrow(upper * weight * value * share * (1.0f + gate * (1.0f - share)));
      d_up[width + at + i] = T::narrow(upper * weight * silu);
    }
    float lanes[16] = {};
    for (int64_t i = piece; i < (piece + 15) / 16 * 16; ++i) products[i] = 0.0f;
    for (int64_t i = 0; i < piece; i += 16)
      for (int j = 0; j < 16; ++j) lanes[j] += products[i + j];
    for (int j = 0; j < 16; ++j) total += lanes[j];
  }
  return total;
}

template <typename T>
struct Functions {
  using Bits = typename T::Bits;
  void (*forward)(const Bits*, Bits*, int64_t, int64_t, int64_t);
  void (*backward)(const Bits*, const Bits*, const float*, Bits*, Bits*, float*, int64_t, int64_t, int64_t);
};

#define EF_INSTANCE(name, target)                                                                                     \
  template <typename T>                                                                                               \
  struct name {                                                                                                       \
    using Bits = typename T::Bits;                                                                                    \
    target static void forward(const Bits* up, Bits* act, int64_t width, int64_t first, int64_t last) {               \
      for (int64_t row = first; row < last; ++row) forward_row<T>(up + row * 2 * width, act + row * width, width);    \
    }                                                                                                                 \
    target static void backward(const Bits* up, const Bits* d, const float* weights, Bits* act, Bits* d_up,           \
                                float* d_weights, int64_t width, int64_t first, int64_t last) {                       \
      for (int64_t row = first; row < last; ++row)                                                                    \
        d_weights[row] = backward_row<T>(up + row * 2 * width, d + row * width, weights[row], act + row * width,      \
                                         d_up + row * 2 * width, width);                                              \
    }                                                                                                                 \
    static constexpr Functions<T> all{forward, backward};                                                             \
  };

EF_INSTANCE(Scalar, )
#if EF_X86
EF_INSTANCE(Avx2, EF_TARGET_AVX2)
EF_INSTANCE(Avx512, EF_TARGET_AVX512)
#endif

template <typename T>
const Functions<T>* functions_of(int32_t requested) {
  switch (choose_isa(requested)) {
    case EF_ISA_SCALAR:
    case EF_ISA_NEON: return &Scalar<T>::all;  // NEON is part of the base of aarch64
#if EF_X86
    case EF_ISA_AVX2: return &Avx2<T>::all;
    case EF_ISA_AVX512:
    case EF_ISA_AVX512_BF16:
    case EF_ISA_AMX: return &Avx512<T>::all;
#endif
    default: return nullptr;
  }
}

template <typename Body>
void over_rows(int64_t rows, int64_t width, int32_t threads, Body body) {
  parallel((rows + kRowsOfTask - 1) / kRowsOfTask, rows * width > (1 << 14) ? threads : 1, [&](int64_t task) {
    body(task * kRowsOfTask, std::min(rows, (task + 1) * kRowsOfTask));
  });
}

}  // namespace
}  // namespace edgefed

using namespace edgefed;

extern "C" {

int64_t ef_swiglu(const void* up, void* act, int32_t dtype, int64_t rows, int64_t width, int32_t isa, int32_t threads) {
  return with_dtype(dtype, [&](auto type) -> int64_t {
    using Bits = typename decltype(type)::Bits;
    const auto* run = functions_of<decltype(type)>(isa);
    if (run == nullptr) return EF_UNSUPPORTED;
    expect_writes(act, static_cast<size_t>(rows * width) * sizeof(Bits), threads);
    over_rows(rows, width, threads, [&](int64_t first, int64_t last) {
      run->forward(static_cast<const Bits*>(up), static_cast<Bits*>(act), width, first, last);
    });
    return EF_OK;
  });
}

int64_t ef_swiglu_backward(const void* up, const void* d, const float* weights, void* act, void* d_up, float* d_weights,
                           int32_t dtype, int64_t rows, int64_t width, int32_t isa, int32_t threads) {
  return with_dtype(dtype, [&](auto type) -> int64_t {
    using Bits = typename decltype(type)::Bits;
    const auto* run = functions_of<decltype(type)>(isa);
    if (run == nullptr) return EF_UNSUPPORTED;
    expect_writes(act, static_cast<size_t>(rows * width) * sizeof(Bits), threads);
    expect_writes(d_up, static_cast<size_t>(rows * width) * 2 * sizeof(Bits), threads);
    over_rows(rows, width, threads, [&](int64_t first, int64_t last) {
      run->backward(static_cast<const Bits*>(up), static_cast<const Bits*>(d), weights, static_cast<Bits*>(act),
                    static_cast<Bits*>(d_up), d_weights, width, first, last);
    });
    return EF_OK;
  });
}

}  // extern "C"
