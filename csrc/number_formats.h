// Conversions between float and the 16-bit formats, the NF4 code, and the choice of an instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "edgefed.h"

// A function body that is compiled for every instruction set that it is inlined into.
#define EF_INLINE inline __attribute__((always_inline))

// A function whose vector width is chosen when the library is loaded, if the tool chain supports it.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define EF_WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EF_WIDEST
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define EF_X86 1
#define EF_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define EF_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define EF_TARGET_AVX512_BF16 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")))
#else
#define EF_X86 0
#endif
// AMX: compilers that know it; elsewhere than on Linux nobody asks the system for it.
#if EF_X86 && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define EF_AMX 1
#define EF_AMX_TARGET \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")))
#else
#define EF_AMX 0
#endif
#if defined(__aarch64__) && defined(__GNUC__)
#define EF_NEON 1
#else
#define EF_NEON 0
#endif

namespace edgefed {

// NF4: quantiles of the normal distribution (QLoRA, arXiv 2305.14314, appendix E), as bitsandbytes has them.
constexpr float kNf4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                            -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                            0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                            0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

template <typename To, typename From>
EF_INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

EF_INLINE float widen_brain(uint16_t brain) { return bits_as<float>(static_cast<uint32_t>(brain) << 16); }

EF_INLINE uint16_t narrow_brain(float value) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

EF_INLINE float widen_half(uint16_t half) {  // finite halves, exactly, subnormal ones too
  const float magnitude = bits_as<float>(static_cast<uint32_t>(half & 0x7FFFu) << 13) * 0x1p112f;
  return bits_as<float>(bits_as<uint32_t>(magnitude) | (static_cast<uint32_t>(half & 0x8000u) << 16));
}

EF_INLINE uint16_t narrow_half(float value) {  // to nearest, ties to even
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return sign | 0x7E00u;
  if (magnitude >= 0x477FF000u) return sign | 0x7C00u;  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the multiples of 2^-24 in the last bits
    return sign | static_cast<uint16_t>(bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u);
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13);
}

// One type for each 16- or 32-bit dtype, for templates.
struct Float32 {
  using Bits = uint32_t;
  static constexpr Bits kSign = 0x80000000u, kExponent = 0x7F800000u;
  static EF_INLINE float widen(Bits bits) { return bits_as<float>(bits); }
  static EF_INLINE Bits narrow(float value) { return bits_as<uint32_t>(value); }
};
struct Half {
  using Bits = uint16_t;
  static constexpr Bits kSign = 0x8000u, kExponent = 0x7C00u;
  static EF_INLINE float widen(Bits bits) { return widen_half(bits); }
  static EF_INLINE Bits narrow(float value) { return narrow_half(value); }
};
struct Brain {
  using Bits = uint16_t;
  static constexpr Bits kSign = 0x8000u, kExponent = 0x7F80u;
  static EF_INLINE float widen(Bits bits) { return widen_brain(bits); }
  static EF_INLINE Bits narrow(float value) { return narrow_brain(value); }
};

// body of the type of a dtype; EF_UNKNOWN_DTYPE for other dtypes.
template <typename Body>
inline int64_t with_dtype(int32_t dtype, Body body) {
  switch (dtype) {
    case EF_F32: return body(Float32());
    case EF_F16: return body(Half());
    case EF_BF16: return body(Brain());
    default: return EF_UNKNOWN_DTYPE;
  }
}

// The instruction set for a request, or -1 if this processor lacks it.
inline int32_t choose_isa(int32_t requested) {
  if (requested == EF_ISA_BEST) return ef_best_isa();
  return ef_has_isa(requested) ? requested : -1;
}

}  // namespace edgefed
