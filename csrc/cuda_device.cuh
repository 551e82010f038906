// Shared by the CUDA kernels: number types, 16-byte loads, the search in a work list.
// tests/kernels/cuda_emulator has headers of the same names, so that g++ can build all of this for a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "edgefed_cuda.h"
#include "number_formats.h"

#ifndef EF_LAUNCH
#define EF_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

#define EF_DEVICE __device__ __forceinline__
#define EF_BOTH __host__ __device__ __forceinline__

namespace edgefed {

constexpr int kWarp = 32;
constexpr int64_t kMostBlocksY = 65535;  // limit of gridDim.y and gridDim.z
constexpr int64_t kMostBlocksX = 2147483647;

// --- work lists ---------------------------------------------------------------------------------------------------
// work: kWorkRows rows of num_slots + 1 begins each: positions, then row tiles by size.

constexpr int kWorkRows = 5;

EF_BOTH int rows_of_work(int row) {
  return row == 0   ? 1
         : row == 1 ? EF_CUDA_FEW_ROWS
         : row == 2 ? EF_CUDA_SMALL_TILE_ROWS
         : row == 3 ? EF_CUDA_MIDDLE_TILE_ROWS
                    : EF_CUDA_TILE_ROWS;
}

EF_BOTH const int32_t* positions_of(const int32_t* work) { return work; }
EF_BOTH const int32_t* tiles_of(const int32_t* work, int64_t num_slots, int rows) {
  int row = 1;
  while (row + 1 < kWorkRows && rows_of_work(row) != rows) ++row;
  return work + row * (num_slots + 1);
}

EF_BOTH int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Largest number of row tiles of `pairs` positions in `slots` slots, for any distribution: the host does not know the
// counts. A slot of c > 0 rows has ceil(c / rows) <= (c + rows - 1) / rows tiles, and at most c.
EF_BOTH int64_t most_tiles(int64_t pairs, int64_t slots, int64_t rows) {
  const int64_t bound = (pairs + slots * (rows - 1)) / rows;
  return bound < pairs ? bound : pairs;
}

// The slot in [first, last) with begins[slot] <= at < begins[slot + 1], or -1 when at >= begins[last].
EF_BOTH int find_slot(const int32_t* begins, int first, int last, int32_t at) {
  if (at >= begins[last]) return -1;
  int low = first, high = last;  // begins[low] <= at < begins[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (begins[middle] <= at) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// --- number types -------------------------------------------------------------------------------------------------

template <typename T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr int32_t value = EF_F32;
};
template <>
struct DtypeOf<__half> {
  static constexpr int32_t value = EF_F16;
};
template <>
struct DtypeOf<__nv_bfloat16> {
  static constexpr int32_t value = EF_BF16;
};

EF_DEVICE float to_float(float value) { return value; }
EF_DEVICE float to_float(__half value) { return __half2float(value); }
EF_DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
EF_DEVICE T from_float(float value);
template <>
EF_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
EF_DEVICE __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
EF_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <typename T>
EF_DEVICE float round_to(float value) {
  return to_float(from_float<T>(value));
}

// Two 16-bit values in a register, the first in the low half.
template <typename T>
EF_DEVICE uint32_t pack_two(float first, float second);
template <>
EF_DEVICE uint32_t pack_two<__half>(float first, float second) {
  return static_cast<uint32_t>(__half_as_ushort(__float2half_rn(first))) |
         static_cast<uint32_t>(__half_as_ushort(__float2half_rn(second))) << 16;
}
template <>
EF_DEVICE uint32_t pack_two<__nv_bfloat16>(float first, float second) {
  return static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(first))) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(second))) << 16;
}
template <typename T>
EF_DEVICE void unpack_two(uint32_t pair, float* out);
template <>
EF_DEVICE void unpack_two<__half>(uint32_t pair, float* out) {
  out[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(pair & 0xFFFFu)));
  out[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}
template <>
EF_DEVICE void unpack_two<__nv_bfloat16>(uint32_t pair, float* out) {
  out[0] = __uint_as_float(pair << 16);
  out[1] = __uint_as_float(pair & 0xFFFF0000u);
}

// Loads from memory of the device that no kernel writes meanwhile. Said outright: of a pointer that was computed with,
// the compiler does not always know that it is not one into shared memory.
template <typename T>
EF_DEVICE T load_global(const T* from) {
#ifdef __CUDA_ARCH__
  return __ldg(from);
#else
  return *from;
#endif
}

// Eight neighbouring values, 16-byte aligned.
template <typename T>
EF_DEVICE void load_eight(const T* from, float* out) {
  if constexpr (std::is_same<T, float>::value) {
    const float4 low = *reinterpret_cast<const float4*>(from);
    const float4 high = *reinterpret_cast<const float4*>(from + 4);
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    unpack_two<T>(raw.x, out);
    unpack_two<T>(raw.y, out + 2);
    unpack_two<T>(raw.z, out + 4);
    unpack_two<T>(raw.w, out + 6);
  }
}
template <typename T>
EF_DEVICE void store_eight(T* to, const float* values) {
  if constexpr (std::is_same<T, float>::value) {
    *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
    *reinterpret_cast<float4*>(to + 4) = make_float4(values[4], values[5], values[6], values[7]);
  } else {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(pack_two<T>(values[0], values[1]), pack_two<T>(values[2], values[3]),
                   pack_two<T>(values[4], values[5]), pack_two<T>(values[6], values[7]));
  }
}

// --- quantized weights --------------------------------------------------------------------------------------------

// Sixteen words of shared memory lie in sixteen banks, and lanes that read the same word share one read: a look-up with
// any pattern of codes takes one pass.
EF_DEVICE void fill_nf4_table(float* table, int thread) {
  constexpr float values[16] = {kNf4[0], kNf4[1], kNf4[2],  kNf4[3],  kNf4[4],  kNf4[5],  kNf4[6],  kNf4[7],
                                kNf4[8], kNf4[9], kNf4[10], kNf4[11], kNf4[12], kNf4[13], kNf4[14], kNf4[15]};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (thread == i) table[i] = values[i];
}

// Four bytes are eight codes; the high half of a byte comes first.
EF_DEVICE void decode_nf4(uint32_t codes, const float* table, float* out) {
#pragma unroll
  for (int byte = 0; byte < 4; ++byte) {
    out[2 * byte] = table[(codes >> (8 * byte + 4)) & 15u];
    out[2 * byte + 1] = table[(codes >> (8 * byte)) & 15u];
  }
}
EF_DEVICE void decode_int8(uint32_t low, uint32_t high, float* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = static_cast<float>(static_cast<int8_t>(low >> (8 * i)));
    out[4 + i] = static_cast<float>(static_cast<int8_t>(high >> (8 * i)));
  }
}

constexpr float kInt8Step = 7.874015718698502e-3f;  // 1 / 127, rounded as bitsandbytes has it

EF_DEVICE float int8_value(float code, float absmax) { return code * absmax * kInt8Step; }

// --- launching ----------------------------------------------------------------------------------------------------

// Makes `device` current for the call: this library has a CUDA runtime of its own beside torch's.
class OnDevice {
 public:
  explicit OnDevice(int32_t device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess && before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  int32_t error() const { return static_cast<int32_t>(error_); }

 private:
  cudaError_t error_ = cudaSuccess;
  int before_ = 0;
  bool changed_ = false;
};

inline int32_t launched() { return static_cast<int32_t>(cudaGetLastError()); }

template <typename Body>
inline int32_t with_cuda_dtype(int32_t dtype, Body body) {
  switch (dtype) {
    case EF_F32: return body(float());
    case EF_F16: return body(__half());
    case EF_BF16: return body(__nv_bfloat16());
    default: return EF_UNKNOWN_DTYPE;
  }
}

}  // namespace edgefed
