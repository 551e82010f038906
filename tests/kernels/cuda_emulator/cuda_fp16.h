// __half for the emulator, converted by csrc/number_formats.h.
#pragma once

#include "number_formats.h"

struct __half {
  uint16_t bits = 0;
};
inline float __half2float(__half value) {
  const uint16_t magnitude = value.bits & 0x7FFFu;
  if (magnitude < 0x7C00u) return edgefed::widen_half(value.bits);
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  return edgefed::bits_as<float>(sign | 0x7F800000u | static_cast<uint32_t>(magnitude & 0x3FFu) << 13);
}
inline __half __float2half_rn(float value) { return {edgefed::narrow_half(value)}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
