// NF4 and INT8, to and from, with the bytes of csrc/quantize.cpp. A product and a division are never contracted into
// anything else here: there is no addition beside them.
#include "cuda_device.cuh"

namespace edgefed {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr float kTiny = 1e-38f;

EF_DEVICE bool is_finite(float value) { return fabsf(value) <= 3.402823466e38f; }  // false for NaN

EF_DEVICE float warp_largest(float value) {
  for (int by = kWarp / 2; by > 0; by /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, by));
  return value;
}

EF_DEVICE void report(uint64_t* error, int64_t at) {
  atomicMin(reinterpret_cast<unsigned long long*>(error), static_cast<unsigned long long>(at));
}

// How many of the 15 bounds between neighbouring codes lie below the value.
EF_DEVICE uint32_t nf4_code(float value) {
  constexpr float bounds[15] = {
      (kNf4[0] + kNf4[1]) / 2.0f,   (kNf4[1] + kNf4[2]) / 2.0f,   (kNf4[2] + kNf4[3]) / 2.0f,
      (kNf4[3] + kNf4[4]) / 2.0f,   (kNf4[4] + kNf4[5]) / 2.0f,   (kNf4[5] + kNf4[6]) / 2.0f,
      (kNf4[6] + kNf4[7]) / 2.0f,   (kNf4[7] + kNf4[8]) / 2.0f,   (kNf4[8] + kNf4[9]) / 2.0f,
      (kNf4[9] + kNf4[10]) / 2.0f,  (kNf4[10] + kNf4[11]) / 2.0f, (kNf4[11] + kNf4[12]) / 2.0f,
      (kNf4[12] + kNf4[13]) / 2.0f, (kNf4[13] + kNf4[14]) / 2.0f, (kNf4[14] + kNf4[15]) / 2.0f};
  uint32_t code = 0;
#pragma unroll
  for (int i = 0; i < 15; ++i) code += value > bounds[i];
  return code;
}

// A warp for each block of weights.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_nf4_kernel(const T* values, int64_t n, int64_t blocksize, uint8_t* packed, float* absmax,
                        uint64_t* error) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = block * blocksize;
  if (begin >= n) return;
  const int64_t size = n - begin < blocksize ? n - begin : blocksize;
  float largest = 0.0f;
  for (int64_t i = lane; i < size; i += kWarp) {
    const float value = to_float(values[begin + i]);
    if (!is_finite(value)) report(error, block);
    largest = fmaxf(largest, fabsf(value));
  }
  largest = warp_largest(largest);
  // A short last block is divided by its absmax, a whole one multiplied by the reciprocal, as bitsandbytes does.
  const bool whole = size == blocksize;
  const float divisor = fmaxf(largest, kTiny), factor = 1.0f / divisor;
  if (lane == 0) absmax[block] = whole ? largest : divisor;
  for (int64_t pair = lane; pair < (size + 1) / 2; pair += kWarp) {
    uint32_t codes[2] = {7, 7};  // bitsandbytes pads with the code of zero
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = 2 * pair + half;
      if (at >= size) continue;
      const float value = to_float(values[begin + at]);
      const float ratio = whole ? value * factor : value / divisor;
      codes[half] = nf4_code(fminf(fmaxf(ratio, -1.0f), 1.0f));
    }
    packed[begin / 2 + pair] = static_cast<uint8_t>(codes[0] << 4 | codes[1]);
  }
}

// A warp for each row. Through half precision, as bitsandbytes' int8_vectorwise_quant(W.half()).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_int8_kernel(const T* values, int64_t rows, int64_t columns, int8_t* packed, float* absmax,
                         uint64_t* error) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (row >= rows) return;
  const T* source = values + row * columns;
  float largest = 0.0f;
  for (int64_t i = lane; i < columns; i += kWarp) {
    const float value = __half2float(__float2half_rn(to_float(source[i])));
    if (!is_finite(value)) report(error, row);
    largest = fmaxf(largest, fabsf(value));
  }
  largest = warp_largest(largest);
  if (lane == 0) absmax[row] = largest;
  const float factor = largest > 0.0f ? (1.0f / largest) * 127.0f : 0.0f;  // two roundings, as torch does 127 / absmax
  for (int64_t i = lane; i < columns; i += kWarp) {
    const float value = __half2float(__float2half_rn(to_float(source[i]))) * factor;
    packed[row * columns + i] = static_cast<int8_t>(static_cast<int32_t>(rintf(value)));  // ties to even
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_nf4_kernel(const uint8_t* packed, const float* absmax, int64_t n, int64_t blocksize, T* out) {
  __shared__ float table[16];
  fill_nf4_table(table, threadIdx.x);
  __syncthreads();
  const int64_t first = 2 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (first >= n) return;
  const uint32_t byte = packed[first / 2];
  const float scale = absmax[first / blocksize];  // blocksize is even: both values belong to it
  out[first] = from_float<T>(table[byte >> 4] * scale);
  if (first + 1 < n) out[first + 1] = from_float<T>(table[byte & 15u] * scale);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_int8_kernel(const int8_t* packed, const float* absmax, int64_t n, int64_t columns, T* out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < n) out[at] = from_float<T>(int8_value(static_cast<float>(packed[at]), absmax[at / columns]));
}

}  // namespace
}  // namespace edgefed

using namespace edgefed;

extern "C" {

int32_t ef_cuda_quantize_nf4(const void* values, int32_t dtype, int64_t n, int64_t blocksize, uint8_t* packed,
                             float* absmax, uint64_t* error, int32_t device, void* stream) {
  if (blocksize < 2 || blocksize % 2) return EF_UNSUPPORTED;
  if (n <= 0) return EF_OK;
  const int64_t blocks = ceil_div(ceil_div(n, blocksize), kWarps);
  if (blocks > kMostBlocksX) return EF_UNSUPPORTED;
  const OnDevice here(device);
  if (here.error() != 0) return here.error();
  return with_cuda_dtype(dtype, [&](auto type) -> int32_t {
    using T = decltype(type);
    EF_LAUNCH(quantize_nf4_kernel<T>, static_cast<unsigned>(blocks), kThreads, stream, static_cast<const T*>(values), n,
              blocksize, packed, absmax, error);
    return launched();
  });
}

int32_t ef_cuda_quantize_int8(const void* values, int32_t dtype, int64_t rows, int64_t columns, int8_t* packed,
                              float* absmax, uint64_t* error, int32_t device, void* stream) {
  if (rows <= 0) return EF_OK;
  const int64_t blocks = ceil_div(rows, kWarps);
  if (blocks > kMostBlocksX) return EF_UNSUPPORTED;
  const OnDevice here(device);
  if (here.error() != 0) return here.error();
  return with_cuda_dtype(dtype, [&](auto type) -> int32_t {
    using T = decltype(type);
    EF_LAUNCH(quantize_int8_kernel<T>, static_cast<unsigned>(blocks), kThreads, stream, static_cast<const T*>(values),
              rows, columns, packed, absmax, error);
    return launched();
  });
}

int32_t ef_cuda_dequantize_nf4(const uint8_t* packed, const float* absmax, int64_t n, int64_t blocksize, void* out,
                               int32_t dtype, int32_t device, void* stream) {
  if (blocksize < 2 || blocksize % 2) return EF_UNSUPPORTED;
  if (n <= 0) return EF_OK;
  const int64_t blocks = ceil_div(ceil_div(n, 2), kThreads);
  if (blocks > kMostBlocksX) return EF_UNSUPPORTED;
  const OnDevice here(device);
  if (here.error() != 0) return here.error();
  return with_cuda_dtype(dtype, [&](auto type) -> int32_t {
    using T = decltype(type);
    EF_LAUNCH(dequantize_nf4_kernel<T>, static_cast<unsigned>(blocks), kThreads, stream, packed, absmax, n, blocksize,
              static_cast<T*>(out));
    return launched();
  });
}

int32_t ef_cuda_dequantize_int8(const int8_t* packed, const float* absmax, int64_t rows, int64_t columns, void* out,
                                int32_t dtype, int32_t device, void* stream) {
  if (rows <= 0 || columns <= 0) return EF_OK;
  const int64_t blocks = ceil_div(rows * columns, kThreads);
  if (blocks > kMostBlocksX) return EF_UNSUPPORTED;
  const OnDevice here(device);
  if (here.error() != 0) return here.error();
  return with_cuda_dtype(dtype, [&](auto type) -> int32_t {
    using T = decltype(type);
    EF_LAUNCH(dequantize_int8_kernel<T>, static_cast<unsigned>(blocks), kThreads, stream, packed, absmax,
              rows * columns, columns, static_cast<T*>(out));
    return launched();
  });
}

}  // extern "C"
