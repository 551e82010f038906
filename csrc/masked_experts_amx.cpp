// Many rows of x for each expert on processors with AMX: its tiles are 16 rows of 64 bytes, 32 bfloat16 each.
//
// y = x W^T: the weights are the left operand, 16 outputs at a time. Dense ones are read where they lie, quantized ones
// are decoded row by row, without a transposition; x is arranged in pairs of k once. y = x W: x is the left operand, and
// the weights are interleaved into panels as for AVX-512 (masked_experts_panels.h).
//
// A decoded weight is the same bfloat16 value that dequantizing gives, except that the scale of an INT8 row of outputs
// comes last. Sums are float32 in ascending order of k, so results do not depend on the number of threads.
#include "masked_experts_panels.h"
#include "parallel.h"

#include <algorithm>

#if EF_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace edgefed {

bool has_amx() {
  static const bool found = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kBrain = 1u << 22, kTile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBrain) || !(d & kTile)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl: the kernel saves tiles only if asked to
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return found;
}

namespace {

constexpr int64_t kTile = 16;                 // rows of a tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileK = 32;                // k of a tile
constexpr int64_t kTileSums = kTile * kTile;  // float32 of a tile of sums
constexpr int64_t kOutputs = 2 * kTile;       // outputs that are multiplied together where the weights come first
constexpr int64_t kStrip = 2;                 // panels that are decoded together: longer pieces of a row of weights
constexpr int64_t kPad = 32;                  // between rows of a buffer, so that they lie in other sets of the cache

// Tiles 0 to 3 hold sums, the others operands.
EF_AMX_TARGET void configure_tiles() {
  struct Config {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static constexpr Config config{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  _tile_loadconfig(&config);
}

// The intrinsics do not say that they read and write memory.
EF_INLINE void order_memory() { asm volatile("" ::: "memory"); }

// --- y = x W^T: weights first -------------------------------------------------------------------------------------

// 64 NF4 weights without a transposition: the codes of 4 i + 1, then 4 i; 4 i + 3, then 4 i + 2.
EF_BRAIN_INLINE Pair decode_words(const uint8_t* packed, float absmax) {
  const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(kNf4), _mm512_set1_ps(absmax));
  const __m512i table = _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(scaled)));
  const __m512i words = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
  const __m512i further = _mm512_add_epi16(shift, _mm512_set1_epi16(8));
  return {_mm512_permutexvar_epi16(_mm512_srlv_epi16(words, shift), table),
          _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, further), table)};
}

EF_BRAIN_INLINE __m512 widen_codes(const int8_t* values) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))));
}

EF_BRAIN_INLINE __m512i narrow_codes(const int8_t* values) {  // 32, exactly
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(widen_codes(values + 16), widen_codes(values)));
}

// Outputs output .. output + 32, columns begin .. end, to rows of `stride` values.
template <int32_t format>
EF_BRAIN void decode_outputs(const EfGroup& group, int64_t columns, int64_t output, int64_t begin, int64_t end,
                             uint16_t* out, int64_t stride) {
  constexpr int64_t kAhead = 4096;  // bytes; rows follow each other, so that memory is read as one stream
  for (int64_t row = 0; row < kOutputs; ++row, out += stride) {
    for (int64_t column = begin; column < end; column += kBlock) {
      const int64_t at = (output + row) * columns + column;
      Pair pair;
      if constexpr (format == EF_NF4) {
        const auto* packed = static_cast<const uint8_t*>(group.data) + (at >> 1);
        _mm_prefetch(reinterpret_cast<const char*>(packed) + kAhead, _MM_HINT_T0);
        pair = decode_words(packed, group.scale[block_of(group, at)]);
      } else {
        const auto* codes = static_cast<const int8_t*>(group.data) + at;
        _mm_prefetch(reinterpret_cast<const char*>(codes) + kAhead, _MM_HINT_T0);
        pair = {narrow_codes(codes), narrow_codes(codes + 32)};
      }
      store(out + column - begin, pair.first);
      store(out + column - begin + 32, pair.second);
    }
  }
}

// Up to 16 rows of x as right operands: tiles of 16 words (two k) of 16 rows; absent rows are zero.
EF_BRAIN void pack_pairs(const uint16_t* const* rows, int64_t count, int64_t k, bool words, char* out) {
  alignas(64) uint16_t order[64];
  for (int i = 0; i < 16; ++i) {
    order[i] = static_cast<uint16_t>(4 * i + 1);
    order[16 + i] = static_cast<uint16_t>(4 * i);
    order[32 + i] = static_cast<uint16_t>(4 * i + 3);
    order[48 + i] = static_cast<uint16_t>(4 * i + 2);
  }
  const __m512i low = load(order), high = load(order + 32);
  for (int64_t at = 0; at < k; at += 2 * kTileK) {
    __m512i first[kTile], second[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      const __m512i a = i < count ? load(rows[i] + at) : _mm512_setzero_si512();
      const __m512i b = i < count ? load(rows[i] + at + kTileK) : _mm512_setzero_si512();
      first[i] = words ? _mm512_permutex2var_epi16(a, low, b) : a;
      second[i] = words ? _mm512_permutex2var_epi16(a, high, b) : b;
    }
    transpose16(first);
    transpose16(second);
    for (int64_t i = 0; i < kTile; ++i) store(out + 64 * i, first[i]);
    for (int64_t i = 0; i < kTile; ++i) store(out + kTileBytes + 64 * i, second[i]);
    out += 2 * kTileBytes;
  }
}

// Sums of two tiles at `upper`, and with four tiles two at `lower`, to and from the tile registers 0 to 3. Inlined, since
// a call keeps no tile register.
template <int tiles>
EF_AMX_TARGET EF_INLINE void load_sums(const float* upper, const float* lower, bool begins) {
  if (begins) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, upper, 64);
  _tile_loadd(1, upper + kTileSums, 64);
  if constexpr (tiles == 4) {
    _tile_loadd(2, lower, 64);
    _tile_loadd(3, lower + kTileSums, 64);
  }
}

template <int tiles>
EF_AMX_TARGET EF_INLINE void store_sums(float* upper, float* lower) {
  _tile_stored(0, upper, 64);
  _tile_stored(1, upper + kTileSums, 64);
  if constexpr (tiles == 4) {
    _tile_stored(2, lower, 64);
    _tile_stored(3, lower + kTileSums, 64);
  }
}

// sums (x tiles, 2, 16, 16) = (begins ? 0 : sums) + weights x, for one or two tiles of rows of x. Rows of `ahead` are
// requested from memory on the way.
template <int x_tiles>
EF_AMX_TARGET void multiply_outputs(const char* weights, int64_t stride, const char* x, int64_t x_stride, int64_t steps,
                                    bool begins, float* sums, const char* ahead) {
  order_memory();
  load_sums<2 * x_tiles>(sums, sums + 2 * kTileSums, begins);
  for (int64_t step = 0; step < steps; ++step, weights += 64, x += kTileBytes) {
    if (ahead != nullptr)
      for (int64_t row = 0; row < kOutputs; ++row) _mm_prefetch(ahead + row * stride + 64 * step, _MM_HINT_T1);
    _tile_loadd(4, weights, stride);
    _tile_loadd(5, weights + kTile * stride, stride);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (x_tiles == 2) {
      _tile_loadd(7, x + x_stride, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_sums<2 * x_tiles>(sums, sums + 2 * kTileSums);
  order_memory();
}

// One tile of rows of x: sums (2, 16 outputs, 16 rows) to y (rows, 32).
EF_BRAIN void finish_outputs(const float* sums, int64_t rows, const float* absmax, uint16_t* y, int64_t stride) {
  for (int64_t half = 0; half < 2; ++half, sums += kTileSums, y += kTile) {
    __m512i r[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      __m512 sum = _mm512_loadu_ps(sums + kTile * i);
      if (absmax) sum = _mm512_mul_ps(sum, _mm512_set1_ps(absmax[kTile * half + i] * kPer127));
      r[i] = _mm512_castps_si512(sum);
    }
    transpose16(r);
    for (int64_t i = 0; i < rows; ++i) {
      const auto narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_castsi512_ps(r[i])));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i * stride), narrow);
    }
  }
}

// --- y = x W: x first ---------------------------------------------------------------------------------------------

// sums (x tiles, 4, 16, 16) = (begins ? 0 : sums) + x panel, two tiles of rows of x and half a panel at a time.
EF_AMX_TARGET void multiply_half(const char* x, int64_t stride, const char* panel, int64_t steps, bool begins,
                                 float* sums) {
  order_memory();
  float* lower = sums + 4 * kTileSums;
  load_sums<4>(sums, lower, begins);
  for (int64_t step = 0; step < steps; ++step, x += 64, panel += 16 * 4 * kPanel) {
    _tile_loadd(4, x, stride);
    _tile_loadd(5, x + kTile * stride, stride);
    _tile_loadd(6, panel, 4 * kPanel);
    _tile_loadd(7, panel + 64, 4 * kPanel);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_sums<4>(sums, lower);
  order_memory();
}

// The same for one tile of rows of x and the whole panel.
EF_AMX_TARGET void multiply_panel(const char* x, int64_t stride, const char* panel, int64_t steps, bool begins,
                                  float* sums) {
  order_memory();
  load_sums<4>(sums, sums + 2 * kTileSums, begins);
  for (int64_t step = 0; step < steps; ++step, x += 64, panel += 16 * 4 * kPanel) {
    _tile_loadd(4, x, stride);
    _tile_loadd(5, panel, 4 * kPanel);
    _tile_loadd(6, panel + 64, 4 * kPanel);
    _tile_loadd(7, panel + 128, 4 * kPanel);
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, panel + 192, 4 * kPanel);
    _tile_dpbf16ps(3, 4, 5);
  }
  store_sums<4>(sums, sums + 2 * kTileSums);
  order_memory();
}

EF_BRAIN void finish_panel(const float* sums, int64_t rows, bool evens_first, uint16_t* y, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, sums += kTile) {
    const __m512 s[4] = {_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + kTileSums), _mm512_loadu_ps(sums + 2 * kTileSums),
                         _mm512_loadu_ps(sums + 3 * kTileSums)};
    finish_row(s, evens_first, y + r * stride);
  }
}

// --- one piece ----------------------------------------------------------------------------------------------------

const uint16_t* row_of(const Problem& problem, int64_t at) {
  return problem.x + (problem.x_rows ? problem.x_rows[at] : at) * problem.k;
}

int64_t weights_first(const Problem& problem, const EfGroup& group, const Piece& piece) {
  const int64_t k = problem.k, x_tiles = (piece.rows + kTile - 1) / kTile, steps = k / kTileK;
  const bool is_dense = group.format == EF_BF16;
  const int64_t part_k = is_dense ? k : std::min<int64_t>(k, kPanelBytes / (2 * kOutputs)), stride = part_k + kPad;
  auto* x = static_cast<char*>(scratch(kScratchX, static_cast<size_t>(x_tiles * steps * kTileBytes)));
  auto* sums = static_cast<float*>(scratch(kScratchSums, static_cast<size_t>(x_tiles * 2 * kTileSums) * 4));
  auto* panel = static_cast<uint16_t*>(scratch(kScratchPanel, static_cast<size_t>(is_dense ? 0 : kOutputs * stride * 2)));
  if (x == nullptr || sums == nullptr || (panel == nullptr && !is_dense)) return EF_NO_MEMORY;
  for (int64_t tile = 0; tile < x_tiles; ++tile) {
    const int64_t first = tile * kTile, count = std::min(kTile, piece.rows - first);
    const uint16_t* sources[kTile];
    for (int64_t i = 0; i < count; ++i) sources[i] = row_of(problem, piece.row + first + i);
    pack_pairs(sources, count, k, group.format == EF_NF4, x + tile * steps * kTileBytes);
  }
  const int64_t last = piece.last * kPanel;
  for (int64_t output = piece.first * kPanel; output < last; output += kOutputs) {
    for (int64_t begin = 0; begin < k; begin += part_k) {
      const int64_t end = std::min(k, begin + part_k);
      const char *weights = reinterpret_cast<const char*>(panel), *ahead = nullptr;
      int64_t row_bytes = 2 * stride;
      if (is_dense) {
        weights = static_cast<const char*>(group.data) + 2 * output * k;
        row_bytes = 2 * k;
        if (output + kOutputs < last) ahead = weights + kOutputs * row_bytes;
      } else if (group.format == EF_NF4) {
        decode_outputs<EF_NF4>(group, k, output, begin, end, panel, stride);
      } else {
        decode_outputs<EF_INT8>(group, k, output, begin, end, panel, stride);
      }
      for (int64_t tile = 0; tile < x_tiles; tile += 2, ahead = nullptr) {
        const char* source = x + (tile * steps + begin / kTileK) * kTileBytes;
        float* target = sums + tile * 2 * kTileSums;
        const int64_t count = (end - begin) / kTileK, x_stride = steps * kTileBytes;
        if (tile + 1 < x_tiles)
          multiply_outputs<2>(weights, row_bytes, source, x_stride, count, begin == 0, target, ahead);
        else
          multiply_outputs<1>(weights, row_bytes, source, x_stride, count, begin == 0, target, ahead);
      }
    }
    const float* absmax = group.format == EF_INT8 ? group.scale + output : nullptr;
    for (int64_t tile = 0; tile < x_tiles; ++tile) {
      uint16_t* y = problem.y + (piece.row + tile * kTile) * problem.n + output;
      finish_outputs(sums + tile * 2 * kTileSums, std::min(kTile, piece.rows - tile * kTile), absmax, y, problem.n);
    }
  }
  return EF_OK;
}

int64_t x_first(const Problem& problem, const EfGroup& group, const Piece& piece) {
  const int64_t k = problem.k, n = problem.n, x_tiles = (piece.rows + kTile - 1) / kTile, stride = 2 * (k + kPad);
  const int64_t part_k = std::min<int64_t>(k, kPanelBytes / kStrip / kPanel / 2), words = part_k / 2 * kPanel;
  auto* x = static_cast<char*>(scratch(kScratchX, static_cast<size_t>(x_tiles * kTile * stride)));
  auto* sums = static_cast<float*>(scratch(kScratchSums, static_cast<size_t>(kStrip * x_tiles * 4 * kTileSums) * 4));
  auto* panel = static_cast<uint32_t*>(scratch(kScratchPanel, static_cast<size_t>(kStrip * words) * 4));
  if (x == nullptr || sums == nullptr || panel == nullptr) return EF_NO_MEMORY;
  for (int64_t row = 0; row < x_tiles * kTile; ++row) {
    if (row < piece.rows)
      std::memcpy(x + row * stride, row_of(problem, piece.row + row), static_cast<size_t>(2 * k));
    else
      std::memset(x + row * stride, 0, static_cast<size_t>(2 * k));
  }
  for (int64_t at = piece.first; at < piece.last; at += kStrip) {
    const int64_t output = at * kPanel, panels = std::min(kStrip, piece.last - at);
    for (int64_t begin = 0; begin < k; begin += part_k) {
      const int64_t end = std::min(k, begin + part_k), steps = (end - begin) / kTileK;
      if (group.format == EF_NF4)
        pack_columns<EF_NF4>(group, n, output, panels, begin, end, panel, words);
      else if (group.format == EF_INT8)
        pack_columns<EF_INT8>(group, n, output, panels, begin, end, panel, words);
      else
        pack_columns<EF_BF16>(group, n, output, panels, begin, end, panel, words);
      for (int64_t p = 0; p < panels; ++p) {
        const char* weights = reinterpret_cast<const char*>(panel + p * words);
        for (int64_t tile = 0; tile < x_tiles; tile += 2) {
          const char* source = x + tile * kTile * stride + 2 * begin;
          float* target = sums + (p * x_tiles + tile) * 4 * kTileSums;
          if (tile + 1 < x_tiles) {
            multiply_half(source, stride, weights, steps, begin == 0, target);
            multiply_half(source, stride, weights + 128, steps, begin == 0, target + 2 * kTileSums);
          } else {
            multiply_panel(source, stride, weights, steps, begin == 0, target);
          }
        }
      }
    }
    for (int64_t tile = 0; tile < x_tiles; ++tile) {
      uint16_t* y = problem.y + (piece.row + tile * kTile) * n + output;
      const int64_t rows = std::min(kTile, piece.rows - tile * kTile);
      for (int64_t p = 0; p < panels; ++p)
        finish_panel(sums + (p * x_tiles + tile) * 4 * kTileSums, rows, group.format == EF_NF4, y + p * kPanel, n);
    }
  }
  return EF_OK;
}

EF_AMX_TARGET void release_tiles() { _tile_release(); }

// --- the gradient of a weight -------------------------------------------------------------------------------------

constexpr int64_t kOuterRows = 256;  // rows of the result in one piece
constexpr int64_t kOuterPart = 512;  // rows of a and b that are multiplied together

// Columns column .. column + 32 of a as rows of `stride` values, for the rows begin .. end of a; zero up to whole tiles.
EF_BRAIN void transpose_a(const Outer& problem, int64_t column, int64_t begin, int64_t end, uint16_t* out,
                          int64_t stride) {
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t row = begin; row < end; row += kTileK, out += kTileK) {
    alignas(64) uint32_t words[kTile][2 * kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      const uint16_t* source = problem.a + (row + 2 * i) * problem.m + column;
      const __m512i upper = row + 2 * i < end ? load(source) : zero;
      interleave_rows(upper, row + 2 * i + 1 < end ? load(source + problem.m) : zero, words[i]);
    }
    for (int64_t half = 0; half < 2; ++half) {
      __m512i r[kTile];
      for (int64_t i = 0; i < kTile; ++i) r[i] = load(words[i] + kTile * half);
      transpose16(r);
      for (int64_t i = 0; i < kTile; ++i) store(out + (kTile * half + i) * stride, r[i]);
    }
  }
}

EF_BRAIN void finish_outer(const float* sums, uint16_t* out, int64_t n, bool past) {
  for (int64_t tile = 0; tile < 2; ++tile, sums += 4 * kTileSums, out += kTile * n) {
    if (!past) {
      finish_panel(sums, kTile, false, out, n);
      continue;
    }
    for (int64_t r = 0; r < kTile; ++r) {
      const float* at = sums + kTile * r;
      const __m512 s[4] = {_mm512_loadu_ps(at), _mm512_loadu_ps(at + kTileSums), _mm512_loadu_ps(at + 2 * kTileSums),
                           _mm512_loadu_ps(at + 3 * kTileSums)};
      finish_row_past(s, out + r * n);
    }
  }
}

// Rows top .. top + height of the result.
int64_t outer_piece(const Outer& problem, int64_t top, int64_t height) {
  const int64_t longest = (std::min(problem.rows, kOuterPart) + kTileK - 1) / kTileK * kTileK, stride = longest + kPad;
  auto* x = static_cast<uint16_t*>(scratch(kScratchX, static_cast<size_t>(height * stride) * 2));
  auto* panel = static_cast<uint32_t*>(scratch(kScratchPanel, static_cast<size_t>(longest / 2 * kPanel) * 4));
  auto* sums = static_cast<float*>(scratch(kScratchSums, static_cast<size_t>(height * kPanel) * 4));
  if (x == nullptr || panel == nullptr || sums == nullptr) return EF_NO_MEMORY;
  const bool past = reinterpret_cast<uintptr_t>(problem.out) % 64 == 0, one_part = problem.rows <= kOuterPart;
  for (int64_t column = 0; column < problem.n; column += kPanel) {
    for (int64_t begin = 0; begin < problem.rows; begin += kOuterPart) {
      const int64_t end = std::min(problem.rows, begin + kOuterPart), steps = (end - begin + kTileK - 1) / kTileK;
      if (column == 0 || !one_part)
        for (int64_t at = 0; at < height; at += kOuterStep)
          transpose_a(problem, top + at, begin, end, x + at * stride, stride);
      pack_b(problem.b, problem.b_rows, problem.n, column, begin, end, panel);
      const int64_t packed = (end - begin + 1) / 2;
      std::memset(panel + packed * kPanel, 0, static_cast<size_t>(steps * kTile - packed) * kPanel * 4);
      const auto* right = reinterpret_cast<const char*>(panel);
      for (int64_t at = 0; at < height; at += kOuterStep) {
        const auto* left = reinterpret_cast<const char*>(x + at * stride);
        float* target = one_part ? sums : sums + at * kPanel;
        multiply_half(left, 2 * stride, right, steps, begin == 0, target);
        multiply_half(left, 2 * stride, right + 128, steps, begin == 0, target + 2 * kTileSums);
        if (end == problem.rows) finish_outer(target, problem.out + (top + at) * problem.n + column, problem.n, past);
      }
    }
  }
  _mm_sfence();
  return EF_OK;
}

}  // namespace

int64_t amx_outer(const Outer& problem, int32_t threads) {
  const int64_t blocks = problem.m / kOuterStep, pieces = (problem.m + kOuterRows - 1) / kOuterRows;
  auto* errors = static_cast<int64_t*>(scratch(0, static_cast<size_t>(pieces) * sizeof(int64_t)));
  if (errors == nullptr) return EF_NO_MEMORY;
  parallel(pieces, threads, [&](int64_t piece) {
    const int64_t top = block_begin(blocks, pieces, piece) * kOuterStep;
    const int64_t height = block_begin(blocks, pieces, piece + 1) * kOuterStep - top;
    expect_writes(problem.out + top * problem.n, static_cast<size_t>(height * problem.n) * sizeof(uint16_t), 1);
    configure_tiles();
    errors[piece] = outer_piece(problem, top, height);
    release_tiles();
  });
  for (int64_t piece = 0; piece < pieces; ++piece)
    if (errors[piece] != EF_OK) return errors[piece];
  return EF_OK;
}

EF_AMX_TARGET float amx_steps(int64_t steps) {
  configure_tiles();
  for (int64_t step = 0; step < steps; ++step) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  release_tiles();
  return 0.0f;
}

int64_t amx_piece(const Problem& problem, const Piece& piece) {
  const EfGroup& group = problem.groups[piece.group];
  configure_tiles();
  const int64_t result =
      problem.transposed ? x_first(problem, group, piece) : weights_first(problem, group, piece);
  release_tiles();  // switching threads is cheaper without them
  return result;
}

}  // namespace edgefed
#else
namespace edgefed {
bool has_amx() { return false; }
}  // namespace edgefed
#endif
