// Weighted sums of raw tensor blocks, for the aggregator. The specification is edgefed/kernels/fold.py: each function
// here gives the same bits as its numpy reference there, which is why nothing may be contracted into a fused
// multiply-add (setup.py compiles with -ffp-contract=off).
#include <cstring>

#include "edgefed.h"
#include "number_formats.h"

namespace {

// Wider vectors (EF_WIDEST) change no bit: every element is computed independently.

constexpr int64_t kUnknownDtype = -2;
constexpr uint64_t kExponent64 = 0x7FF0000000000000ull;
constexpr uint32_t kExponent32 = 0x7F800000u;
constexpr uint16_t kExponent16 = 0x7C00u;
constexpr uint16_t kExponentBrain = 0x7F80u;

template <typename To, typename From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline double widen_half(uint16_t half) {
  // Shifted into place, the exponent is 112 too small; the product is exact, for subnormal halves too.
  const float magnitude = bits_as<float>(static_cast<uint32_t>(half & 0x7FFFu) << 13) * 0x1p112f;
  return (half & 0x8000u) ? -static_cast<double>(magnitude) : static_cast<double>(magnitude);
}

inline double widen_brain(uint16_t brain) { return bits_as<float>(static_cast<uint32_t>(brain) << 16); }

inline uint16_t narrow_brain(double value) {
  const uint32_t bits = bits_as<uint32_t>(static_cast<float>(value));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > kExponent32 ? 0x7FC0u : rounded);
}

// One rounding from double to half. Through float32 there would be two, and numpy's astype has one.
inline uint16_t narrow_half(double value) {
  const uint64_t bits = bits_as<uint64_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 48) & 0x8000u);
  const uint64_t magnitude = bits & 0x7FFFFFFFFFFFFFFFull;
  if (magnitude > kExponent64) return sign | 0x7E00u;
  if (magnitude >= 0x40EFFE0000000000ull) return sign | kExponent16;  // 65520 and more round to infinity
  const int exponent = static_cast<int>(magnitude >> 52) - 1023;
  if (exponent < -25) return sign;  // below half of the smallest subnormal, 2^-24
  const uint64_t significand = (magnitude & 0xFFFFFFFFFFFFFull) | (1ull << 52);
  const int dropped = exponent >= -14 ? 42 : 42 + (-14 - exponent);  // of 53 significant bits, at most 11 remain
  const uint64_t kept = significand >> dropped;
  const uint64_t rest = significand & ((1ull << dropped) - 1);
  const uint64_t half_way = 1ull << (dropped - 1);
  const uint64_t rounded = kept + (rest > half_way || (rest == half_way && (kept & 1u)));
  // The implicit bit of `rounded` adds one to the exponent, and so does a carry out of the significand.
  const uint64_t base = exponent >= -14 ? static_cast<uint64_t>(exponent + 14) << 10 : 0;
  return static_cast<uint16_t>(sign | (base + rounded));
}

// A block is first tested as a whole, which is one vector reduction; only a bad one is searched.
template <typename Bits>
inline int64_t find_nonfinite(const Bits* values, int64_t n, Bits exponent) {
  Bits bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= static_cast<Bits>((values[i] & exponent) == exponent);
  if (!bad) return -1;
  int64_t first = 0;
  while ((values[first] & exponent) != exponent) ++first;
  return first;
}

EF_WIDEST int64_t find_nonfinite_64(const uint64_t* values, int64_t n) { return find_nonfinite(values, n, kExponent64); }
EF_WIDEST int64_t find_nonfinite_32(const uint32_t* values, int64_t n) { return find_nonfinite(values, n, kExponent32); }
EF_WIDEST int64_t find_nonfinite_16(const uint16_t* values, int64_t n, uint16_t exponent) {
  return find_nonfinite(values, n, exponent);
}

EF_WIDEST void fold_f64(double* __restrict sum, const double* __restrict values, int64_t n, double weight) {
  for (int64_t i = 0; i < n; ++i) sum[i] += weight * values[i];
}
EF_WIDEST void fold_f32(double* __restrict sum, const float* __restrict values, int64_t n, double weight) {
  for (int64_t i = 0; i < n; ++i) sum[i] += weight * static_cast<double>(values[i]);
}
EF_WIDEST void fold_half(double* __restrict sum, const uint16_t* __restrict values, int64_t n, double weight) {
  for (int64_t i = 0; i < n; ++i) sum[i] += weight * widen_half(values[i]);
}
EF_WIDEST void fold_brain(double* __restrict sum, const uint16_t* __restrict values, int64_t n, double weight) {
  for (int64_t i = 0; i < n; ++i) sum[i] += weight * widen_brain(values[i]);
}
EF_WIDEST void narrow_to_f32(const double* __restrict sum, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(sum[i]);
}
EF_WIDEST void narrow_to_brain(const double* __restrict sum, uint16_t* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = narrow_brain(sum[i]);
}

}  // namespace

extern "C" {

int ef_abi_version(void) { return EF_ABI_VERSION; }

int64_t ef_first_nonfinite(const void* raw, int32_t dtype, int64_t n) {
  switch (dtype) {
    case EF_F64: return find_nonfinite_64(static_cast<const uint64_t*>(raw), n);
    case EF_F32: return find_nonfinite_32(static_cast<const uint32_t*>(raw), n);
    case EF_F16: return find_nonfinite_16(static_cast<const uint16_t*>(raw), n, kExponent16);
    case EF_BF16: return find_nonfinite_16(static_cast<const uint16_t*>(raw), n, kExponentBrain);
    default: return kUnknownDtype;
  }
}

int64_t ef_fold_block(double* accumulator, const void* raw, int32_t dtype, int64_t n, double weight) {
  const int64_t bad = ef_first_nonfinite(raw, dtype, n);
  if (bad != -1) return bad;
  switch (dtype) {
    case EF_F64: fold_f64(accumulator, static_cast<const double*>(raw), n, weight); break;
    case EF_F32: fold_f32(accumulator, static_cast<const float*>(raw), n, weight); break;
    case EF_F16: fold_half(accumulator, static_cast<const uint16_t*>(raw), n, weight); break;
    default: fold_brain(accumulator, static_cast<const uint16_t*>(raw), n, weight); break;
  }
  return -1;
}

int64_t ef_narrow_block(const double* accumulator, void* out, int32_t dtype, int64_t n) {
  switch (dtype) {
    case EF_F64: std::memcpy(out, accumulator, static_cast<size_t>(n) * sizeof(double)); return 0;
    case EF_F32: narrow_to_f32(accumulator, static_cast<float*>(out), n); return 0;
    case EF_F16:
      for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(out)[i] = narrow_half(accumulator[i]);
      return 0;
    case EF_BF16: narrow_to_brain(accumulator, static_cast<uint16_t*>(out), n); return 0;
    default: return kUnknownDtype;
  }
}

}  // extern "C"
