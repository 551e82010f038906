// Peak arithmetic of this processor, for benchmarks: a share of a limit says more than a time.
#include "masked_experts.h"
#include "parallel.h"

#if EF_X86
#include <immintrin.h>
#endif

namespace edgefed {
namespace {

constexpr int kSums = 12;  // independent sums, more than a multiply-add takes cycles

#if EF_X86
EF_TARGET_AVX512_BF16 float bf16_steps(int64_t steps) {
  __m512 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1e-3f), _mm512_set1_ps(1e-3f));
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], x, x);
    asm volatile("" ::"v"(x));
  }
  float total = 0;
  for (int i = 0; i < kSums; ++i) total += _mm512_reduce_add_ps(sums[i]);
  return total;
}

EF_TARGET_AVX512_BF16 float int8_steps(int64_t steps) {
  __m512i sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_epi32(i);
  const __m512i x = _mm512_set1_epi8(1);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], x, x);
    asm volatile("" ::"v"(x));
  }
  int total = 0;
  for (int i = 0; i < kSums; ++i) total += _mm512_reduce_add_epi32(sums[i]);
  return static_cast<float>(total);
}

EF_TARGET_AVX512 float float_steps(int64_t steps) {
  __m512 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512 x = _mm512_set1_ps(1.0000001f), y = _mm512_set1_ps(1e-9f);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_fmadd_ps(sums[i], x, y);
  }
  float total = 0;
  for (int i = 0; i < kSums; ++i) total += _mm512_reduce_add_ps(sums[i]);
  return total;
}
#endif

}  // namespace
}  // namespace edgefed

using namespace edgefed;

extern "C" int64_t ef_arithmetic_steps(int32_t dtype, int64_t steps, int32_t threads) {
#if EF_X86
  float (*run)(int64_t) = nullptr;
  int64_t per_step = kSums * 16 * 2;  // multiply-adds of float32, each two operations
  if (dtype == EF_F32 && ef_has_isa(EF_ISA_AVX512)) run = float_steps;
  if (dtype == EF_BF16 && ef_has_isa(EF_ISA_AVX512_BF16)) run = bf16_steps, per_step *= 2;
  if (dtype == EF_INT8 && ef_has_isa(EF_ISA_AVX512_BF16)) run = int8_steps, per_step *= 4;
#if EF_AMX
  if (dtype == EF_BF16_AMX && ef_has_isa(EF_ISA_AMX)) run = amx_steps, per_step = kAmxOperations;
#endif
  if (run == nullptr) return EF_UNSUPPORTED;
  volatile float sink = 0;
  parallel(threads, threads, [&](int64_t) { sink = run(steps); });
  return threads * steps * per_step;
#else
  (void)dtype, (void)steps, (void)threads;
  return EF_UNSUPPORTED;
#endif
}
