// Few rows of x for each expert, without any vector instruction that a processor may lack, and with NEON where that is
// part of every processor.
#include "masked_experts.h"

#if EF_NEON
#include <arm_neon.h>
#endif

namespace edgefed {
namespace scalar {
namespace {

struct Lanes {
  static constexpr int kLanes = 4;
  float v[4];
  static EF_INLINE Lanes broadcast(float a) { return {{a, a, a, a}}; }
  static EF_INLINE Lanes zero() { return broadcast(0.0f); }
  static EF_INLINE Lanes load(const float* at) { return {{at[0], at[1], at[2], at[3]}}; }
  static EF_INLINE Lanes add(Lanes a, Lanes b) {
    for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
    return a;
  }
  static EF_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    for (int i = 0; i < 4; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static EF_INLINE float sum(Lanes a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
};

EF_INLINE void decode_nf4(const uint8_t* packed, float* out) {
  for (int i = 0; i < 32; ++i) {
    out[i] = kNf4[packed[i] >> 4];
    out[32 + i] = kNf4[packed[i] & 15];
  }
}

EF_INLINE void decode_int8(const int8_t* values, float* out) {
  for (int i = 0; i < kBlock; ++i) out[i] = static_cast<float>(values[i]);
}

}  // namespace

#define EF_HERE
#define kRowsHere kRows
extern const RowsKernel kRows;
#include "masked_experts_rows.inc"
#undef kRowsHere
#undef EF_HERE
}  // namespace scalar

const RowsKernel kRowsScalar = scalar::kRows;

#if EF_NEON
namespace neon {
namespace {

struct Lanes {
  static constexpr int kLanes = 4;
  float32x4_t v;
  static EF_INLINE Lanes broadcast(float a) { return {vdupq_n_f32(a)}; }
  static EF_INLINE Lanes zero() { return broadcast(0.0f); }
  static EF_INLINE Lanes load(const float* at) { return {vld1q_f32(at)}; }
  static EF_INLINE Lanes add(Lanes a, Lanes b) { return {vaddq_f32(a.v, b.v)}; }
  static EF_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  static EF_INLINE float sum(Lanes a) { return vaddvq_f32(a.v); }
};

// The four bytes of each code value are four tables of 16 bytes.
EF_INLINE void decode_16(uint8x16_t codes, const uint8x16_t (&planes)[4], float* out) {
  uint8x16x4_t bytes;
  for (int plane = 0; plane < 4; ++plane) bytes.val[plane] = vqtbl1q_u8(planes[plane], codes);
  vst4q_u8(reinterpret_cast<uint8_t*>(out), bytes);
}

EF_INLINE void decode_nf4(const uint8_t* packed, float* out) {
  const uint8x16x4_t tables = vld4q_u8(reinterpret_cast<const uint8_t*>(kNf4));
  const uint8x16_t planes[4] = {tables.val[0], tables.val[1], tables.val[2], tables.val[3]};
  for (int half = 0; half < 2; ++half) {
    const uint8x16_t pairs = vld1q_u8(packed + 16 * half);
    decode_16(vshrq_n_u8(pairs, 4), planes, out + 16 * half);
    decode_16(vandq_u8(pairs, vdupq_n_u8(15)), planes, out + 32 + 16 * half);
  }
}

EF_INLINE void decode_int8(const int8_t* values, float* out) {
  for (int i = 0; i < kBlock; i += 8) {
    const int16x8_t wide = vmovl_s8(vld1_s8(values + i));
    vst1q_f32(out + i, vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))));
    vst1q_f32(out + i + 4, vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide))));
  }
}

}  // namespace

#define EF_HERE
#define kRowsHere kRows
extern const RowsKernel kRows;
#include "masked_experts_rows.inc"
#undef kRowsHere
#undef EF_HERE
}  // namespace neon

const RowsKernel kRowsNeon = neon::kRows;
#endif

}  // namespace edgefed
