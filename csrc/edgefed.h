// The C interface of edgefed's native part: plain C types, no link to Python or torch, loaded with ctypes.
// edgefed/native.py declares the same functions; raise EF_ABI_VERSION when a signature changes.
#pragma once

#include <stdint.h>

#define EF_ABI_VERSION 1

#if defined(_WIN32)
#define EF_API __declspec(dllexport)
#else
#define EF_API __attribute__((visibility("default")))
#endif

// Floating point types of a tensor frame. Raw bits, little-endian.
enum EfDtype { EF_F64 = 0, EF_F32 = 1, EF_F16 = 2, EF_BF16 = 3 };

#ifdef __cplusplus
extern "C" {
#endif

EF_API int ef_abi_version(void);

// Index of the first infinity or NaN among n values, -1 when all are finite, -2 for an unknown dtype.
EF_API int64_t ef_first_nonfinite(const void* raw, int32_t dtype, int64_t n);

// accumulator[i] += weight * raw[i] in double: one rounding for the product, one for the sum.
// Returns what ef_first_nonfinite returns; the accumulator is untouched unless that is -1.
EF_API int64_t ef_fold_block(double* accumulator, const void* raw, int32_t dtype, int64_t n, double weight);

// out[i] = accumulator[i] rounded to dtype, to nearest, ties to even. bfloat16 rounds through float32, as
// edgefed.protocol.frames.narrow does. Returns 0, or -2 for an unknown dtype.
EF_API int64_t ef_narrow_block(const double* accumulator, void* out, int32_t dtype, int64_t n);

#ifdef __cplusplus
}
#endif
