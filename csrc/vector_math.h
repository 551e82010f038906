// Exponential and logarithm without branches, so that loops over them become vectors. Include it after
// `#pragma GCC optimize("no-trapping-math")`: comparisons become selections only when they are not assumed to trap.
#pragma once

#include "number_formats.h"

namespace edgefed {

constexpr float kSmallest = 1.17549435e-38f;  // the smallest normal number

EF_INLINE float larger(float a, float b) { return a > b ? a : b; }
EF_INLINE float smaller(float a, float b) { return a < b ? a : b; }

// Polynomials of single precision from Cephes (S. Moshier, netlib).
EF_INLINE float natural_log(float x) {  // of a positive, normal number
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t shifted = bits - 0x3F3504F3u;  // the exponent so that the significand lies in [sqrt 1/2, sqrt 2)
  const float exponent = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float m = bits_as<float>((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  float y = p * m * z - 2.12194440e-4f * exponent - 0.5f * z;
  return (m + y) + 0.693359375f * exponent;
}

EF_INLINE float exponential(float x) {  // 0 below the smallest normal number
  const float clamped = larger(x, -87.3f);
  const float n = (clamped * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1.0f;
  const float scaled = bits_as<float>(bits_as<uint32_t>(y) + (static_cast<uint32_t>(static_cast<int32_t>(n)) << 23));
  return x < -87.3f ? 0.0f : scaled;
}

}  // namespace edgefed
