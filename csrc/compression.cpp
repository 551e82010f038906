// Codecs of changes. The specification is edgefed/kernels/compression.py: decoding gives the same bits as its numpy
// reference, and so does encoding, except that scales of sums may differ in the last bit.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "edgefed.h"
#include "number_formats.h"

namespace {

constexpr int64_t kLargestBlock = 4096;
constexpr float kMaxScale = 1e30f, kSmallest = 1e-30f;
constexpr uint32_t kMagnitude = 0x7FFFFFFFu;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void put(uint8_t* target, float value) { std::memcpy(target, &value, sizeof value); }
inline float get(const uint8_t* source) {
  float value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

// Where the parts of a block of `count` values are.
struct Layout {
  int64_t sent, low_bits, scales, codes, low, high;
  Layout(const EfCodec& codec, int64_t count) {
    sent = codec.top ? (count * codec.top + codec.block - 1) / codec.block : count;
    low_bits = low = high = 0;
    scales = codec.bits == 2 ? 8 : 4;
    codes = (sent * codec.bits + 7) / 8;
    if (codec.top) {
      while ((sent << (low_bits + 1)) <= count) ++low_bits;
      low = (sent * low_bits + 7) / 8;
      high = (sent + ((count - 1) >> low_bits) + 7) / 8;
    }
  }
  int64_t bytes() const { return scales + codes + low + high; }
};

// --- uniform codes ----------------------------------------------------------------------------------------------

EF_WIDEST uint32_t largest_bits(const float* values, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, bits_of(values[i]) & kMagnitude);
  return largest;
}

EF_WIDEST void scale_codes(const float* values, int64_t n, float factor, float limit, int8_t* codes) {
  // Adding and taking away 1.5 * 2^23 rounds to nearest, ties to even.
  for (int64_t i = 0; i < n; ++i) {
    const float rounded = (values[i] * factor + 12582912.0f) - 12582912.0f;
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(std::min(std::max(rounded, -limit), limit)));
  }
}

void encode_uniform(const EfCodec& codec, const float* values, int64_t n, uint8_t* out) {
  const float limit = codec.bits == 8 ? 127.0f : 7.0f;
  float largest = float_of(largest_bits(values, n));
  if (largest < kSmallest) largest = 0.0f;
  put(out, largest / limit);
  int8_t codes[kLargestBlock];
  int8_t* target = codec.bits == 8 ? reinterpret_cast<int8_t*>(out + 4) : codes;
  scale_codes(values, n, largest > 0.0f ? limit / largest : 0.0f, limit, target);
  if (codec.bits == 8) return;
  codes[n] = 0;
  for (int64_t i = 0; i < (n + 1) / 2; ++i) {
    out[4 + i] = static_cast<uint8_t>((codes[2 * i] + 8) | (codes[2 * i + 1] + 8) << 4);
  }
}

EF_WIDEST void decode_int8(const int8_t* codes, int64_t n, float scale, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(codes[i]) * scale;
}

EF_WIDEST void decode_int4(const uint8_t* codes, int64_t n, float scale, float* out) {
  for (int64_t i = 0; i < n / 2; ++i) {
    out[2 * i] = static_cast<float>((codes[i] & 15) - 8) * scale;
    out[2 * i + 1] = static_cast<float>((codes[i] >> 4) - 8) * scale;
  }
  if (n & 1) out[n - 1] = static_cast<float>((codes[n / 2] & 15) - 8) * scale;
}

// --- a sign and one of two magnitudes ---------------------------------------------------------------------------

// Sums in four lanes: one chain of additions would be as slow as all the rest.
EF_WIDEST void sums_above(const float* values, int64_t n, double split, double* high, double* low, int64_t* count) {
  double sums[2][4] = {};
  int64_t counts[4] = {};
  for (int64_t i = 0; i < n; ++i) {
    const double magnitude = std::fabs(values[i]);
    const bool above = magnitude > split;
    sums[0][i & 3] += above ? magnitude : 0.0;
    sums[1][i & 3] += above ? 0.0 : magnitude;
    counts[i & 3] += above;
  }
  *high = (sums[0][0] + sums[0][1]) + (sums[0][2] + sums[0][3]);
  *low = (sums[1][0] + sums[1][1]) + (sums[1][2] + sums[1][3]);
  *count = counts[0] + counts[1] + counts[2] + counts[3];
}

void encode_levels(const float* values, int64_t n, uint8_t* out) {
  double high, low, last = 0.0;
  int64_t count;
  sums_above(values, n, -1.0, &high, &low, &count);
  double split = high / static_cast<double>(n);
  for (int step = 0; step < 2; ++step) {
    last = split;
    sums_above(values, n, split, &high, &low, &count);
    high /= static_cast<double>(std::max<int64_t>(count, 1));
    low /= static_cast<double>(std::max<int64_t>(n - count, 1));
    split = (low + high) / 2;
  }
  put(out, static_cast<float>(low));
  put(out + 4, static_cast<float>(high));
  uint8_t* codes = out + 8;
  for (int64_t at = 0; at < n; at += 4) {
    uint32_t packed = 0;
    for (int64_t i = 0; i < std::min<int64_t>(4, n - at); ++i) {
      const float value = values[at + i];
      const uint32_t code = bits_of(value) >> 31 | static_cast<uint32_t>(std::fabs(value) > last) << 1;
      packed |= code << (2 * i);
    }
    *codes++ = static_cast<uint8_t>(packed);
  }
}

struct Levels {
  float of[4];
  explicit Levels(const uint8_t* raw) : of{get(raw), -get(raw), get(raw + 4), -get(raw + 4)} {}
  float value(const uint8_t* codes, int64_t i) const { return of[codes[i / 4] >> (2 * (i & 3)) & 3]; }
};

// --- the largest values alone -----------------------------------------------------------------------------------

void encode_indexed(const Layout& layout, const float* values, int64_t n, uint8_t* out) {
  uint32_t magnitudes[kLargestBlock];
  for (int64_t i = 0; i < n; ++i) magnitudes[i] = bits_of(values[i]) & kMagnitude;
  std::nth_element(magnitudes, magnitudes + (n - layout.sent), magnitudes + n);
  const uint32_t least = magnitudes[n - layout.sent];
  int64_t ties = layout.sent;
  for (int64_t i = n - layout.sent; i < n; ++i) ties -= magnitudes[i] > least;
  float chosen[kLargestBlock];
  uint8_t* low = out + layout.scales + layout.codes;
  uint8_t* high = low + layout.low;
  std::memset(low, 0, static_cast<size_t>(layout.low + layout.high));
  int64_t k = 0;
  for (int64_t i = 0; i < n && k < layout.sent; ++i) {
    const uint32_t magnitude = bits_of(values[i]) & kMagnitude;
    if (magnitude < least || (magnitude == least && ties-- <= 0)) continue;
    chosen[k] = values[i];
    for (int64_t bit = 0; bit < layout.low_bits; ++bit) {
      const int64_t at = k * layout.low_bits + bit;
      low[at >> 3] |= static_cast<uint8_t>((i >> bit & 1) << (at & 7));
    }
    const int64_t at = k + (i >> layout.low_bits);
    high[at >> 3] |= static_cast<uint8_t>(1u << (at & 7));
    ++k;
  }
  encode_levels(chosen, layout.sent, out);
}

// Calls body(k, index) for each index of a block. Returns whether they are as many as there should be.
template <typename Body>
inline bool each_index(const Layout& layout, const uint8_t* raw, Body body) {
  const uint8_t* low = raw + layout.scales + layout.codes;
  const uint8_t* high = low + layout.low;
  int64_t k = 0;
  for (int64_t byte = 0; byte < layout.high; ++byte) {
    for (uint32_t bits = high[byte]; bits; bits &= bits - 1) {
      if (k == layout.sent) return false;
      int64_t bit = 0;
      while (!(bits >> bit & 1)) ++bit;
      int64_t index = (8 * byte + bit - k) << layout.low_bits;
      for (int64_t at = k * layout.low_bits, to = 0; to < layout.low_bits; ++at, ++to) {
        index |= static_cast<int64_t>(low[at >> 3] >> (at & 7) & 1) << to;
      }
      if (!body(k, index)) return false;
      ++k;
    }
  }
  return k == layout.sent;
}

bool is_valid(const EfCodec& codec, const Layout& layout, const uint8_t* raw, int64_t n) {
  for (int64_t at = 0; at < layout.scales; at += 4) {
    const float scale = get(raw + at);
    if (!(scale >= 0.0f && scale <= kMaxScale)) return false;
  }
  int64_t before = -1;
  return !codec.top || each_index(layout, raw, [&](int64_t, int64_t index) {
    const bool fine = index > before && index < n;
    before = index;
    return fine;
  });
}

}  // namespace

extern "C" {

int64_t ef_encode_change(const EfCodec* codec, const float* values, int64_t n, uint8_t* out) {
  constexpr int64_t kPiece = 1 << 16;
  for (int64_t at = 0; at < n; at += kPiece) {
    if (!(float_of(largest_bits(values + at, std::min(kPiece, n - at))) <= kMaxScale)) return 1 + at;
  }
  for (int64_t at = 0; at < n; at += codec->block) {
    const int64_t count = std::min<int64_t>(codec->block, n - at);
    const Layout layout(*codec, count);
    if (codec->top) {
      encode_indexed(layout, values + at, count, out);
    } else if (codec->bits == 2) {
      encode_levels(values + at, count, out);
    } else {
      encode_uniform(*codec, values + at, count, out);
    }
    out += layout.bytes();
  }
  return EF_OK;
}

void ef_decode_change(const EfCodec* codec, const uint8_t* raw, int64_t n, float* out) {
  for (int64_t at = 0; at < n; at += codec->block) {
    const int64_t count = std::min<int64_t>(codec->block, n - at);
    const Layout layout(*codec, count);
    float* target = out + at;
    if (codec->bits == 8) {
      decode_int8(reinterpret_cast<const int8_t*>(raw + 4), count, get(raw), target);
    } else if (codec->bits == 4) {
      decode_int4(raw + 4, count, get(raw), target);
    } else {
      const Levels levels(raw);
      const uint8_t* codes = raw + 8;
      if (codec->top) {
        std::memset(target, 0, static_cast<size_t>(count) * sizeof(float));
        each_index(layout, raw, [&](int64_t k, int64_t index) {
          if (index >= count) return false;  // never in valid bytes; never write beyond the block
          target[index] = levels.value(codes, k);
          return true;
        });
      } else {
        for (int64_t i = 0; i < count; ++i) target[i] = levels.value(codes, i);
      }
    }
    raw += layout.bytes();
  }
}

int64_t ef_check_change(const EfCodec* codec, const uint8_t* raw, int64_t n) {
  for (int64_t at = 0; at < n; at += codec->block) {
    const int64_t count = std::min<int64_t>(codec->block, n - at);
    const Layout layout(*codec, count);
    if (!is_valid(*codec, layout, raw, count)) return 1 + at / codec->block;
    raw += layout.bytes();
  }
  return EF_OK;
}

}  // extern "C"
