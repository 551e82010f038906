// Many rows of x for each expert, AVX-512 with BF16 and VNNI: weights are decoded into panels of 64 outputs, in the
// order that the multiply-add instructions read, and multiplied with 6 rows of x at a time in 24 accumulators.
//
// Products are bfloat16 (or 8-bit) with float32 (int32) sums. A decoded weight is the same bfloat16 value that
// dequantizing gives. Every output is one sum over k in ascending order of the panel, so results do not depend on the
// number of threads.
#include "masked_experts_panels.h"
#include "parallel.h"

#include <algorithm>

#if EF_X86
namespace edgefed {
namespace {

constexpr int64_t kTileRows = 6;        // rows of x in a register tile
// --- panels -----------------------------------------------------------------------------------------------------
// A panel holds, for each step (two k of bfloat16, four of int8), 64 words of 32 bits: one for each output.

// Outputs are rows of W: output .. output + 64, reduction over the columns begin .. end.
template <int32_t format>
EF_BRAIN void pack_rows(const EfGroup& group, int64_t columns, int64_t output, int64_t begin, int64_t end,
                       uint32_t* panel) {
  for (int64_t quarter = 0; quarter < kPanel; quarter += 16) {
    for (int64_t column = begin; column < end; column += kBlock) {
      __m512i first[16], second[16];
      for (int i = 0; i < 16; ++i) {
        // The rows lie apart, which the processor's own prefetching does not follow: ask for the next sixteen.
        constexpr int64_t kBits = format == EF_NF4 ? 4 : format == EF_INT8 ? 8 : 16;
        const int64_t next = (output + quarter + 16 + i) * columns + column;
        _mm_prefetch(static_cast<const char*>(group.data) + (next * kBits >> 3), _MM_HINT_T1);
        const Pair pair = decode<format>(group, columns, output + quarter + i, column);
        first[i] = pair.first;
        second[i] = pair.second;
      }
      uint32_t* out = panel + (column - begin) / 2 * kPanel + quarter;
      transpose16(first);
      for (int i = 0; i < 16; ++i) store(out + i * kPanel, first[i]);
      transpose16(second);
      for (int i = 0; i < 16; ++i) store(out + (16 + i) * kPanel, second[i]);
    }
  }
}

// As pack_rows with int8 left as it is; also the sum of each output's weights.
EF_BRAIN void pack_rows_int8(const EfGroup& group, int64_t columns, int64_t output, int64_t begin, int64_t end,
                            uint32_t* panel, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t quarter = 0; quarter < kPanel; quarter += 16) {
    __m512i sum = load(sums + quarter);
    for (int64_t column = begin; column < end; column += kBlock) {
      __m512i words[16];
      for (int i = 0; i < 16; ++i) {
        const int8_t* weights = static_cast<const int8_t*>(group.data) + (output + quarter + i) * columns + column;
        _mm_prefetch(weights + 16 * columns, _MM_HINT_T1);
        words[i] = load(weights);
      }
      transpose16(words);
      uint32_t* out = panel + (column - begin) / 4 * kPanel + quarter;
      for (int i = 0; i < 16; ++i) {
        store(out + i * kPanel, words[i]);
        sum = _mm512_dpbusd_epi32(sum, ones, words[i]);
      }
    }
    store(sums + quarter, sum);
  }
}

// --- x ----------------------------------------------------------------------------------------------------------
// Rows are cut into blocks of at most 6; a block holds, step by step, one word of 32 bits of each of its rows.

EF_BRAIN void pack_x(const uint16_t* const* rows, int64_t count, int64_t k, bool evens_first, uint32_t* out) {
  alignas(64) uint16_t order[64];
  for (int i = 0; i < 32; ++i) {
    order[i] = static_cast<uint16_t>(evens_first ? 2 * i : i);
    order[32 + i] = static_cast<uint16_t>(evens_first ? 2 * i + 1 : 32 + i);
  }
  const __m512i low = load(order), high = load(order + 32);
  alignas(64) uint32_t words[32];
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t at = 0; at < k; at += kBlock) {
      const __m512i a = load(rows[row] + at), b = load(rows[row] + at + 32);
      store(words, _mm512_permutex2var_epi16(a, low, b));
      store(words + 16, _mm512_permutex2var_epi16(a, high, b));
      uint32_t* target = out + at / 2 * count + row;
      for (int i = 0; i < 32; ++i) target[i * count] = words[i];
    }
  }
}

// To unsigned 8 bits around 128, one scale for each row: x = scale * (word - 128), |x - rounded| <= scale / 2.
EF_BRAIN float quantize_row(const uint16_t* row, int64_t k, uint8_t* out) {
  __m512 largest = _mm512_setzero_ps();
  for (int64_t at = 0; at < k; at += 16) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + at)));
    largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))));
  }
  const float absmax = _mm512_reduce_max_ps(largest);
  const __m512 factor = _mm512_set1_ps(absmax > 0 ? 127.0f / absmax : 0.0f);
  for (int64_t at = 0; at < k; at += 16) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + at)));
    const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    const __m512i rounded = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(value, factor)), _mm512_set1_epi32(128));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + at), _mm512_cvtepi32_epi8(rounded));
  }
  return absmax / 127.0f;
}

void pack_x_int8(const uint16_t* const* rows, int64_t count, int64_t k, uint8_t* row_buffer, uint32_t* out,
                 float* scales) {
  for (int64_t row = 0; row < count; ++row) {
    scales[row] = quantize_row(rows[row], k, row_buffer);
    for (int64_t at = 0; at < k / 4; ++at) std::memcpy(out + at * count + row, row_buffer + 4 * at, 4);
  }
}

// --- register tiles ---------------------------------------------------------------------------------------------

struct BrainSteps {
  using Sum = __m512;
  static EF_BRAIN_INLINE Sum zero() { return _mm512_setzero_ps(); }
  static EF_BRAIN_INLINE Sum add(Sum sum, uint32_t x, __m512i w) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x))),
                            reinterpret_cast<__m512bh>(w));
  }
  static EF_BRAIN_INLINE Sum from(const void* at) { return _mm512_loadu_ps(at); }
  static EF_BRAIN_INLINE void to(void* at, Sum sum) { _mm512_storeu_ps(at, sum); }
};

struct Int8Steps {
  using Sum = __m512i;
  static EF_BRAIN_INLINE Sum zero() { return _mm512_setzero_si512(); }
  static EF_BRAIN_INLINE Sum add(Sum sum, uint32_t x, __m512i w) {
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(static_cast<int>(x)), w);
  }
  static EF_BRAIN_INLINE Sum from(const void* at) { return load(at); }
  static EF_BRAIN_INLINE void to(void* at, Sum sum) { store(at, sum); }
};

// Memory to prefetch while a panel is multiplied, a few lines at a time: the weights of the next panel.
struct Ahead {
  const char* at = nullptr;
  int64_t lines = 0, rows = 0, stride = 0, line = 0;  // `rows` rows of `lines` lines of 64 bytes, `stride` bytes apart

  EF_INLINE void ask(int64_t count) {
    for (; count > 0 && rows > 0; --count) {
      _mm_prefetch(at + 64 * line, _MM_HINT_T1);
      if (++line == lines) {
        line = 0;
        at += stride;
        --rows;
      }
    }
  }
};

// sums (rows, 64) of 32 bits = (begins ? 0 : sums) + x panel. After each kAskSteps steps `each` lines of `ahead`.
constexpr int64_t kAskSteps = 16;

template <typename Steps, int rows>
EF_BRAIN void tile(const uint32_t* x, const uint32_t* panel, int64_t steps, bool begins, uint32_t* sums, Ahead& ahead,
                   int64_t each) {
  typename Steps::Sum s[rows][4];
  // All loops over the sums are unrolled: the compiler keeps them in registers only when no index is variable.
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) s[r][j] = begins ? Steps::zero() : Steps::from(sums + r * kPanel + 16 * j);
  }
  for (int64_t step = 0; step < steps; ahead.ask(each)) {
    for (const int64_t end = std::min(steps, step + kAskSteps); step < end; ++step, x += rows, panel += kPanel) {
      const __m512i w0 = load(panel), w1 = load(panel + 16), w2 = load(panel + 32), w3 = load(panel + 48);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        s[r][0] = Steps::add(s[r][0], x[r], w0);
        s[r][1] = Steps::add(s[r][1], x[r], w1);
        s[r][2] = Steps::add(s[r][2], x[r], w2);
        s[r][3] = Steps::add(s[r][3], x[r], w3);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) Steps::to(sums + r * kPanel + 16 * j, s[r][j]);
  }
}

template <typename Steps>
EF_INLINE void run_tile(int64_t rows, const uint32_t* x, const uint32_t* panel, int64_t steps, bool begins,
                        uint32_t* sums, Ahead& ahead, int64_t each) {
  switch (rows) {
    case 1: return tile<Steps, 1>(x, panel, steps, begins, sums, ahead, each);
    case 2: return tile<Steps, 2>(x, panel, steps, begins, sums, ahead, each);
    case 3: return tile<Steps, 3>(x, panel, steps, begins, sums, ahead, each);
    case 4: return tile<Steps, 4>(x, panel, steps, begins, sums, ahead, each);
    case 5: return tile<Steps, 5>(x, panel, steps, begins, sums, ahead, each);
    default: return tile<Steps, 6>(x, panel, steps, begins, sums, ahead, each);
  }
}

EF_BRAIN void finish_brain(const uint32_t* sums, int64_t rows, bool evens_first, uint16_t* y, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, sums += kPanel) {
    const __m512 s[4] = {_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 16), _mm512_loadu_ps(sums + 32),
                         _mm512_loadu_ps(sums + 48)};
    finish_row(s, evens_first, y + r * stride);
  }
}

EF_BRAIN void finish_past(const uint32_t* sums, int64_t rows, uint16_t* y, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, sums += kPanel) {
    const __m512 s[4] = {_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 16), _mm512_loadu_ps(sums + 32),
                         _mm512_loadu_ps(sums + 48)};
    finish_row_past(s, y + r * stride);
  }
}

EF_BRAIN void finish_int8(const uint32_t* sums, int64_t rows, const float* x_scales, const float* absmax,
                         const int32_t* weight_sums, uint16_t* y, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, sums += kPanel) {
    __m512 s[4];
    for (int j = 0; j < 4; ++j) {
      const __m512i shifted = _mm512_sub_epi32(load(sums + 16 * j), _mm512_slli_epi32(load(weight_sums + 16 * j), 7));
      const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(absmax + 16 * j), _mm512_set1_ps(x_scales[r] * kPer127));
      s[j] = _mm512_mul_ps(_mm512_cvtepi32_ps(shifted), scale);
    }
    finish_row(s, false, y + r * stride);
  }
}

// --- the product ------------------------------------------------------------------------------------------------

void pack(const Problem& problem, const EfGroup& group, int64_t output, int64_t begin, int64_t end, uint32_t* panel,
          int32_t* weight_sums) {
  if (problem.int8) return pack_rows_int8(group, problem.k, output, begin, end, panel, weight_sums);
  if (problem.transposed) {
    if (group.format == EF_NF4) return pack_columns<EF_NF4>(group, problem.n, output, 1, begin, end, panel, 0);
    if (group.format == EF_INT8) return pack_columns<EF_INT8>(group, problem.n, output, 1, begin, end, panel, 0);
    return pack_columns<EF_BF16>(group, problem.n, output, 1, begin, end, panel, 0);
  }
  if (group.format == EF_NF4) return pack_rows<EF_NF4>(group, problem.k, output, begin, end, panel);
  if (group.format == EF_INT8) return pack_rows<EF_INT8>(group, problem.k, output, begin, end, panel);
  return pack_rows<EF_BF16>(group, problem.k, output, begin, end, panel);
}

// The weights that pack() will read.
Ahead source_of(const Problem& problem, const EfGroup& group, int64_t output, int64_t begin, int64_t end) {
  const int64_t bits = group.format == EF_NF4 ? 4 : group.format == EF_INT8 ? 8 : 16;
  const int64_t columns = problem.transposed ? problem.n : problem.k;
  const int64_t first = problem.transposed ? begin * columns + output : output * columns + begin;
  const int64_t width = problem.transposed ? kPanel : end - begin, rows = problem.transposed ? end - begin : kPanel;
  return {static_cast<const char*>(group.data) + (first * bits >> 3), (width * bits + 511) / 512, rows,
          columns * bits >> 3, 0};
}

// Rows row .. row + rows of the sorted pairs with the panels first .. last of one expert.
int64_t multiply(const Problem& problem, const EfGroup& group, int64_t row, int64_t rows, int64_t first, int64_t last) {
  const int64_t k = problem.k, per_word = problem.int8 ? 4 : 2, steps = k / per_word;
  const int64_t blocks = (rows + kTileRows - 1) / kTileRows;
  const int64_t part_k = std::min(k, kPanelBytes / 4 / kPanel * per_word / kBlock * kBlock);
  auto* x = static_cast<uint32_t*>(scratch(kScratchX, static_cast<size_t>(rows * steps) * 4 + static_cast<size_t>(k)));
  auto* panel = static_cast<uint32_t*>(scratch(kScratchPanel, static_cast<size_t>(part_k / per_word * kPanel) * 4));
  auto* sums = static_cast<uint32_t*>(scratch(kScratchSums, static_cast<size_t>(rows * kPanel) * 4));
  auto* scales = static_cast<float*>(scratch(kScratchScales, static_cast<size_t>(rows) * 4));
  if (x == nullptr || panel == nullptr || sums == nullptr || scales == nullptr) return EF_NO_MEMORY;
  const bool evens_x = !problem.transposed && group.format == EF_NF4;
  const bool evens_y = problem.transposed && group.format == EF_NF4;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block_begin(rows, blocks, block), count = block_begin(rows, blocks, block + 1) - begin;
    const uint16_t* sources[kTileRows];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = row + begin + i;
      sources[i] = problem.x + (problem.x_rows ? problem.x_rows[at] : at) * k;
    }
    if (problem.int8)
      pack_x_int8(sources, count, k, reinterpret_cast<uint8_t*>(x + rows * steps), x + begin * steps, scales + begin);
    else
      pack_x(sources, count, k, evens_x, x + begin * steps);
  }
  for (int64_t output = first * kPanel; output < last * kPanel; output += kPanel) {
    alignas(64) int32_t weight_sums[kPanel] = {};
    for (int64_t begin = 0; begin < k; begin += part_k) {
      const int64_t end = std::min(k, begin + part_k);
      pack(problem, group, output, begin, end, panel, weight_sums);
      Ahead ahead;
      if (end < k)
        ahead = source_of(problem, group, output, end, std::min(k, end + part_k));
      else if (output + kPanel < last * kPanel)
        ahead = source_of(problem, group, output + kPanel, 0, part_k);
      const int64_t stops = blocks * (((end - begin) / per_word + kAskSteps - 1) / kAskSteps);
      const int64_t each = (ahead.rows * ahead.lines + stops - 1) / stops;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = block_begin(rows, blocks, block), count = block_begin(rows, blocks, block + 1) - at;
        const uint32_t* source = x + at * steps + begin / per_word * count;
        uint32_t* target = sums + at * kPanel;
        if (problem.int8)
          run_tile<Int8Steps>(count, source, panel, (end - begin) / per_word, begin == 0, target, ahead, each);
        else
          run_tile<BrainSteps>(count, source, panel, (end - begin) / per_word, begin == 0, target, ahead, each);
        if (end < k) continue;
        uint16_t* y = problem.y + (row + at) * problem.n + output;
        if (problem.int8)
          finish_int8(target, count, scales + at, group.scale + output, weight_sums, y, problem.n);
        else
          finish_brain(target, count, evens_y, y, problem.n);
      }
    }
  }
  return EF_OK;
}

}  // namespace

int64_t tiles_matmul(const EfGroup* groups, int64_t num_groups, const uint16_t* x, const int64_t* x_rows, uint16_t* y,
                     int64_t n, int64_t k, bool transposed, bool int8, bool amx, int32_t threads) {
  const Problem problem{groups, x, x_rows, y, n, k, transposed, int8};
  const int64_t panels = n / kPanel;
  // Enough pieces that no thread waits long for the last one; each decodes its panels once for all its rows.
  const int64_t cuts = std::clamp<int64_t>((8 * threads + num_groups - 1) / std::max<int64_t>(num_groups, 1), 1, panels);
  int64_t count = 0;
  for (int64_t g = 0; g < num_groups; ++g) count += (groups[g].row_count + kChunkRows - 1) / kChunkRows * cuts;
  auto* pieces = static_cast<Piece*>(scratch(0, static_cast<size_t>(count + 1) * (sizeof(Piece) + sizeof(int64_t))));
  if (pieces == nullptr) return EF_NO_MEMORY;
  int64_t* errors = reinterpret_cast<int64_t*>(pieces + count + 1);
  int64_t at = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t rows = groups[g].row_count, chunks = (rows + kChunkRows - 1) / kChunkRows;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t begin = block_begin(rows, chunks, chunk), end = block_begin(rows, chunks, chunk + 1);
      for (int64_t cut = 0; cut < cuts; ++cut)
        pieces[at++] = {g, groups[g].row_begin + begin, end - begin, block_begin(panels, cuts, cut),
                        block_begin(panels, cuts, cut + 1)};
    }
  }
  parallel(count, threads, [&](int64_t task) {
    const Piece& piece = pieces[task];
#if EF_AMX
    if (amx) {
      errors[task] = amx_piece(problem, piece);
      return;
    }
#else
    (void)amx;
#endif
    errors[task] = multiply(problem, groups[piece.group], piece.row, piece.rows, piece.first, piece.last);
  });
  for (int64_t task = 0; task < count; ++task)
    if (errors[task] != EF_OK) return errors[task];
  return EF_OK;
}

// --- the gradient of a weight -----------------------------------------------------------------------------------

namespace {

constexpr int64_t kOuterRows = 192;  // rows of the result in one piece

// Columns column .. column + count of a, two rows of a in a word; an odd last row meets zero.
void pack_a(const uint16_t* a, int64_t stride, int64_t column, int64_t count, int64_t begin, int64_t end,
            uint32_t* out) {
  for (int64_t p = begin; p < end; p += 2)
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t low = a[p * stride + column + i];
      const uint32_t high = p + 1 < end ? a[(p + 1) * stride + column + i] : 0;
      *out++ = low | high << 16;
    }
}

}  // namespace

int64_t tiles_outer(const uint16_t* a, const uint16_t* b, const int64_t* b_rows, uint16_t* out, int64_t rows, int64_t m,
                    int64_t n, bool amx, int32_t threads) {
#if EF_AMX
  if (amx && m % kOuterStep == 0) return amx_outer({a, b, b_rows, out, rows, m, n}, threads);
#else
  (void)amx;
#endif
  constexpr int64_t kPart = kPanelBytes / 4 / kPanel * 2;  // rows of a and b in one panel
  const int64_t pieces = (m + kOuterRows - 1) / kOuterRows, steps = (std::min(rows, kPart) + 1) / 2;
  auto* errors = static_cast<int64_t*>(scratch(0, static_cast<size_t>(pieces + 1) * sizeof(int64_t)));
  if (errors == nullptr) return EF_NO_MEMORY;
  const bool one_part = rows <= kPart, aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0;
  parallel(pieces, threads, [&](int64_t piece) {
    const int64_t top = block_begin(m, pieces, piece), height = block_begin(m, pieces, piece + 1) - top;
    const int64_t blocks = (height + kTileRows - 1) / kTileRows;
    auto* x = static_cast<uint32_t*>(scratch(kScratchX, static_cast<size_t>(height * steps) * 4));
    auto* panel = static_cast<uint32_t*>(scratch(kScratchPanel, static_cast<size_t>(steps * kPanel) * 4));
    auto* sums = static_cast<uint32_t*>(scratch(kScratchSums, static_cast<size_t>(height * kPanel) * 4));
    errors[piece] = x && panel && sums ? EF_OK : EF_NO_MEMORY;
    if (errors[piece] != EF_OK) return;
    expect_writes(out + top * n, static_cast<size_t>(height * n) * sizeof(uint16_t), 1);
    auto pack_all_a = [&](int64_t begin, int64_t end) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = block_begin(height, blocks, block), count = block_begin(height, blocks, block + 1) - at;
        pack_a(a, m, top + at, count, begin, end, x + at * ((end - begin + 1) / 2));
      }
    };
    if (one_part) pack_all_a(0, rows);
    for (int64_t column = 0; column < n; column += kPanel) {
      for (int64_t begin = 0; begin < rows; begin += kPart) {
        const int64_t end = std::min(rows, begin + kPart), length = (end - begin + 1) / 2;
        if (!one_part) pack_all_a(begin, end);
        pack_b(b, b_rows, n, column, begin, end, panel);
        Ahead ahead;
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t at = block_begin(height, blocks, block), count = block_begin(height, blocks, block + 1) - at;
          run_tile<BrainSteps>(count, x + at * length, panel, length, begin == 0, sums + at * kPanel, ahead, 0);
          if (end < rows) continue;
          uint16_t* target = out + (top + at) * n + column;
          if (aligned)
            finish_past(sums + at * kPanel, count, target, n);
          else
            finish_brain(sums + at * kPanel, count, false, target, n);
        }
      }
    }
    _mm_sfence();
  });
  for (int64_t piece = 0; piece < pieces; ++piece)
    if (errors[piece] != EF_OK) return errors[piece];
  return EF_OK;
}

}  // namespace edgefed
#endif
