// Every instruction set of the processor that runs this against the scalar one, without torch or Python: also for a
// processor that is emulated. Prints one line for each and exits with the number of differences.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "edgefed.h"

namespace {

int errors = 0;

void expect(bool holds, const char* what, int isa) {
  if (!holds) {
    std::printf("instruction set %d: %s\n", isa, what);
    ++errors;
  }
}

uint32_t state = 1;
float random_value() {
  state = state * 1664525u + 1013904223u;
  return (static_cast<float>(state >> 8) / (1 << 24) - 0.5f) * 0.1f;
}

uint16_t to_brain(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(bits >> 16);
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(error / size);
}

constexpr int64_t kRows = 192, kColumns = 320, kCount = kRows * kColumns, kTokens = 7;

struct Results {
  std::vector<uint8_t> packed = std::vector<uint8_t>(kCount / 2);
  std::vector<int8_t> bytes = std::vector<int8_t>(kCount);
  std::vector<float> absmax = std::vector<float>(kCount / 64), row_absmax = std::vector<float>(kRows);
  std::vector<uint32_t> wide = std::vector<uint32_t>(kCount);
  std::vector<uint16_t> brain = std::vector<uint16_t>(kCount), half = std::vector<uint16_t>(kCount);
  std::vector<uint16_t> brain8 = std::vector<uint16_t>(kCount);
  std::vector<float> y4 = std::vector<float>(kTokens * kRows), y8 = std::vector<float>(kTokens * kRows);
  std::vector<double> statistics = std::vector<double>(6 * 40);
};

Results run(int isa, int32_t dtype, const void* weights, const std::vector<float>& x, const std::vector<float>& router) {
  Results r;
  expect(ef_quantize_nf4(weights, dtype, kCount, 64, r.packed.data(), r.absmax.data(), isa, 2) == EF_OK, "nf4", isa);
  expect(ef_quantize_int8(weights, dtype, kRows, kColumns, r.bytes.data(), r.row_absmax.data(), isa, 2) == EF_OK, "int8",
         isa);
  ef_dequantize_nf4(r.packed.data(), r.absmax.data(), kCount, 64, r.wide.data(), EF_F32, isa, 2);
  ef_dequantize_nf4(r.packed.data(), r.absmax.data(), kCount, 64, r.brain.data(), EF_BF16, isa, 2);
  ef_dequantize_nf4(r.packed.data(), r.absmax.data(), kCount, 64, r.half.data(), EF_F16, isa, 2);
  ef_dequantize_int8(r.bytes.data(), r.row_absmax.data(), kRows, kColumns, r.brain8.data(), EF_BF16, isa, 2);
  const EfGroup four{r.packed.data(), r.absmax.data(), 0, kTokens, EF_NF4, 64};
  const EfGroup eight{r.bytes.data(), r.row_absmax.data(), 0, kTokens, EF_INT8, 0};
  expect(ef_grouped_matmul(&four, 1, x.data(), nullptr, r.y4.data(), EF_F32, kRows, kColumns, 0, EF_ROWS, isa, 2) ==
             EF_OK, "rows nf4", isa);
  expect(ef_grouped_matmul(&eight, 1, x.data(), nullptr, r.y8.data(), EF_F32, kRows, kColumns, 0, EF_ROWS, isa, 2) ==
             EF_OK, "rows int8", isa);
  std::vector<int64_t> indices(kTokens * 2);
  std::vector<float> gates(kTokens * 2, 0.25f);
  for (size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<int64_t>(i * 7 % 40);
  expect(ef_router_statistics(r.statistics.data(), router.data(), EF_F32, EF_SOFTMAX, indices.data(), gates.data(),
                              EF_F32, kTokens, 40, 2, isa, 2) == EF_OK, "statistics", isa);
  return r;
}

}  // namespace

int main() {
  std::vector<float> weights(kCount), x(kTokens * kColumns), router(kTokens * 40);
  std::vector<uint16_t> brain(kCount);
  for (float& value : weights) value = random_value();
  for (float& value : x) value = random_value();
  for (float& value : router) value = 50 * random_value();
  for (int64_t i = 0; i < kCount; ++i) brain[i] = to_brain(weights[i]);
  for (const int isa : {EF_ISA_AVX2, EF_ISA_AVX512, EF_ISA_AVX512_BF16, EF_ISA_AMX, EF_ISA_NEON}) {
    if (!ef_has_isa(isa)) continue;
    for (const int32_t dtype : {EF_F32, EF_BF16}) {
      const void* source = dtype == EF_F32 ? static_cast<const void*>(weights.data()) : brain.data();
      const Results a = run(EF_ISA_SCALAR, dtype, source, x, router), b = run(isa, dtype, source, x, router);
      expect(same(a.packed, b.packed) && same(a.absmax, b.absmax), "other bytes of nf4", isa);
      expect(same(a.bytes, b.bytes) && same(a.row_absmax, b.row_absmax), "other bytes of int8", isa);
      expect(same(a.wide, b.wide) && same(a.brain, b.brain) && same(a.half, b.half), "other values of nf4", isa);
      expect(same(a.brain8, b.brain8), "other values of int8", isa);
      expect(difference(b.y4, a.y4) < 1e-5, "other products with nf4", isa);
      expect(difference(b.y8, a.y8) < 1e-5, "other products with int8", isa);
      for (size_t i = 0; i < a.statistics.size(); ++i)
        expect(std::fabs(a.statistics[i] - b.statistics[i]) <= 1e-5 * std::fabs(a.statistics[i]) + 1e-9,
               "other statistics", isa);
    }
    std::printf("instruction set %d compared\n", isa);
  }
  return errors > 100 ? 100 : errors;
}
