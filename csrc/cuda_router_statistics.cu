// The router statistics of one batch, edgefed/kernels/router_statistics.py: no copy of the size of the router's
// output. Blocks sum their tokens, a second kernel adds the blocks: both in a fixed order, in float64.
#include "cuda_device.cuh"

namespace edgefed {
namespace {

constexpr int kThreads = 128;
constexpr int kPiece = 256;  // pairs in shared memory at once
constexpr int64_t kFewestTokens = 16, kMostBlocks = 1024;
enum Row { kTokens, kGateSum, kGateMax, kGateLogSum, kGateComplementLogSum, kRoutedGateSum, kAttentionSum, kMostRows };

int64_t tokens_of_block(int64_t tokens) {
  const int64_t share = ceil_div(tokens, kMostBlocks);
  return share < kFewestTokens ? kFewestTokens : share;
}

// What makes G of a token's logits: G = f(logit - shift) / divisor, f = exp or the logistic function.
struct Scaling {
  float shift, divisor;
};

EF_DEVICE float gate_of(float router, int32_t kind, const Scaling& scaling) {
  if (kind == EF_CUDA_SOFTMAX) return expf(router - scaling.shift) / scaling.divisor;
  if (kind == EF_CUDA_SIGMOID) return 1.0f / (1.0f + expf(-router)) / scaling.divisor;
  return router;
}

// A warp for a token; lanes take every 32nd expert, then neighbours are joined in a fixed tree.
template <typename Router>
EF_DEVICE Scaling scaling_of(const Router* row, int64_t experts, int32_t kind) {
  const int lane = threadIdx.x % kWarp;
  float largest = -3.402823466e38f;
  if (kind == EF_CUDA_SOFTMAX) {
    for (int64_t expert = lane; expert < experts; expert += kWarp) largest = fmaxf(largest, to_float(row[expert]));
    for (int by = kWarp / 2; by > 0; by /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, by));
  }
  float sum = 0.0f;
  for (int64_t expert = lane; expert < experts; expert += kWarp)
    sum += gate_of(to_float(row[expert]), kind, {largest, 1.0f});
  for (int by = kWarp / 2; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
  return {largest, fmaxf(sum, 1.175494351e-38f)};
}

// partials: (blocks, rows, experts), 7 rows with received and 6 without
template <typename Router, typename Weight>
__global__ void __launch_bounds__(kThreads)
    partial_statistics_kernel(const Router* router, int32_t kind, const int64_t* indices, const Weight* weights,
                              const float* received, int64_t tokens, int64_t experts, int64_t top_k, int64_t share,
                              double* partials) {
  __shared__ int32_t chosen[kPiece];
  __shared__ float weight_of[kPiece];
  __shared__ float received_of[kPiece];
  __shared__ Scaling scaling[kFewestTokens];
  const int64_t first = blockIdx.x * share, last = first + share < tokens ? first + share : tokens;
  for (int64_t base = 0; base < experts; base += kThreads) {  // all threads take part in every turn
    const int64_t expert = base + threadIdx.x;
    double sum = 0.0, log_sum = 0.0, complement_sum = 0.0, routed = 0.0, attention = 0.0;
    float largest = 0.0f;
    int64_t count = 0;
    for (int64_t begin = first; begin < last; begin += kFewestTokens) {
      const int size = static_cast<int>(last - begin < kFewestTokens ? last - begin : kFewestTokens);
      if (kind != EF_CUDA_PROBABILITY) {
        __syncthreads();
        for (int i = threadIdx.x / kWarp; i < size; i += kThreads / kWarp) {
          const Scaling own = scaling_of(router + (begin + i) * experts, experts, kind);
          if (threadIdx.x % kWarp == 0) scaling[i] = own;
        }
        __syncthreads();
      }
      for (int i = 0; expert < experts && i < size; ++i) {
        const float g = gate_of(to_float(router[(begin + i) * experts + expert]), kind, scaling[i]);
        // log1p keeps the small gates of many experts, where 1 - g rounds; a gate may pass 1 by one bit.
        const float at_most_1 = fminf(g, 1.0f), complement = 1.0f - at_most_1;
        sum += g;
        largest = fmaxf(largest, g);
        if (g != 0.0f) log_sum += g * logf(g);
        if (complement != 0.0f) complement_sum += complement * log1pf(-at_most_1);
      }
    }
    for (int64_t begin = first * top_k; begin < last * top_k; begin += kPiece) {
      const int64_t left = last * top_k - begin;
      const int size = static_cast<int>(left < kPiece ? left : kPiece);
      __syncthreads();
      for (int i = threadIdx.x; i < size; i += kThreads) {
        const int64_t index = indices[begin + i];
        if (index < 0 || index >= experts) __trap();
        chosen[i] = static_cast<int32_t>(index);
        weight_of[i] = to_float(weights[begin + i]);
        received_of[i] = received == nullptr ? 0.0f : received[(begin + i) / top_k];
      }
      __syncthreads();
      for (int i = 0; i < size; ++i) {
        if (chosen[i] != expert) continue;
        ++count;
        routed += weight_of[i];
        attention += received_of[i];
      }
    }
    if (expert < experts) {
      const int64_t rows = received == nullptr ? kAttentionSum : kMostRows;
      double* own = partials + blockIdx.x * rows * experts + expert;
      own[kTokens * experts] = static_cast<double>(count);
      own[kGateSum * experts] = sum;
      own[kGateMax * experts] = largest;
      own[kGateLogSum * experts] = log_sum;
      own[kGateComplementLogSum * experts] = complement_sum;
      own[kRoutedGateSum * experts] = routed;
      if (received != nullptr) own[kAttentionSum * experts] = attention;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    add_statistics_kernel(const double* partials, int64_t blocks, int64_t rows, int64_t experts, double* statistics) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, size = rows * experts;
  if (at >= size) return;
  const bool is_max = at / experts == kGateMax;
  double result = is_max ? statistics[at] : 0.0;
  for (int64_t block = 0; block < blocks; ++block) {
    const double value = partials[block * size + at];
    result = is_max ? fmax(result, value) : result + value;
  }
  statistics[at] = is_max ? result : statistics[at] + result;
}

}  // namespace
}  // namespace edgefed

using namespace edgefed;

extern "C" {

int64_t ef_cuda_statistics_scratch(int64_t tokens, int64_t experts) {
  return ceil_div(tokens, tokens_of_block(tokens)) * kMostRows * experts;
}

int32_t ef_cuda_router_statistics(double* statistics, const void* router, int32_t router_dtype, int32_t kind,
                                  const int64_t* indices, const void* weights, int32_t weight_dtype,
                                  const float* received, int64_t tokens, int64_t experts, int64_t top_k,
                                  double* partials, int32_t device, void* stream) {
  if (tokens <= 0 || experts <= 0) return EF_OK;
  if (experts > kMostBlocksX || top_k < 0 || kind < EF_CUDA_PROBABILITY || kind > EF_CUDA_SIGMOID)
    return EF_UNSUPPORTED;
  const OnDevice here(device);
  if (here.error() != 0) return here.error();
  const int64_t share = tokens_of_block(tokens), blocks = ceil_div(tokens, share);
  const int32_t error = with_cuda_dtype(router_dtype, [&](auto type) -> int32_t {
    using Router = decltype(type);
    const Router* rows = static_cast<const Router*>(router);
    const auto blocks_x = static_cast<unsigned>(blocks);
    if (weight_dtype == router_dtype) {
      const auto kernel = partial_statistics_kernel<Router, Router>;
      EF_LAUNCH(kernel, blocks_x, kThreads, stream, rows, kind, indices, static_cast<const Router*>(weights),
                received, tokens, experts, top_k, share, partials);
    } else if (weight_dtype == EF_F32) {
      const auto kernel = partial_statistics_kernel<Router, float>;
      EF_LAUNCH(kernel, blocks_x, kThreads, stream, rows, kind, indices, static_cast<const float*>(weights),
                received, tokens, experts, top_k, share, partials);
    } else {
      return EF_UNSUPPORTED;
    }
    return launched();
  });
  if (error != EF_OK) return error;
  const int64_t all_rows = received == nullptr ? kAttentionSum : kMostRows;
  EF_LAUNCH(add_statistics_kernel, static_cast<unsigned>(ceil_div(all_rows * experts, kThreads)), kThreads, stream,
            partials, blocks, all_rows, experts, statistics);
  return launched();
}

}  // extern "C"
