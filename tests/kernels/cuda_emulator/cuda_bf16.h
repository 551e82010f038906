// __nv_bfloat16 for the emulator, converted by csrc/number_formats.h.
#pragma once

#include "number_formats.h"

struct __nv_bfloat16 {
  uint16_t bits = 0;
};
inline float __bfloat162float(__nv_bfloat16 value) { return edgefed::widen_brain(value.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {edgefed::narrow_brain(value)}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
