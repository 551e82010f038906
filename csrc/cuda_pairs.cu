// Sorting the pairs of a layer by slot, and moving rows between pairs and tokens.
#include "cuda_device.cuh"

namespace edgefed {
namespace {

constexpr int kChunk = 256;  // pairs of one block of the sort, and its threads

// --- sort ---------------------------------------------------------------------------------------------------------
// A stable counting sort in three steps: counts of each chunk; begins of each slot, and of each chunk within its slot;
// positions. chunk_counts: (chunks + 1, num_slots), the last row for the totals.

struct Sort {
  const int64_t* slots;
  int32_t pairs, num_slots, top_k, chunks;
  int32_t* order;
  int32_t* tokens;
  int32_t* place;
  int32_t* work;
  int32_t* chunk_counts;
};

__device__ void load_chunk(const Sort& sort, int chunk, int32_t* slots) {
  const int64_t pair = static_cast<int64_t>(chunk) * kChunk + threadIdx.x;
  const int64_t slot = pair < sort.pairs ? sort.slots[pair] : -1;
  if (slot >= sort.num_slots) __trap();
  slots[threadIdx.x] = slot < 0 ? -1 : static_cast<int32_t>(slot);
  __syncthreads();
}

__device__ void count_chunk(const Sort& sort, int chunk, const int32_t* slots) {
  for (int slot = threadIdx.x; slot < sort.num_slots; slot += kChunk) {
    int count = 0;
    for (int i = 0; i < kChunk; ++i) count += slots[i] == slot;
    sort.chunk_counts[static_cast<int64_t>(chunk) * sort.num_slots + slot] = count;
  }
}

// One block. Chunk counts become begins within the slot; then a warp each makes one row of the work list.
__device__ void make_begins(const Sort& sort) {
  const int64_t num_slots = sort.num_slots;
  int32_t* totals = sort.chunk_counts + sort.chunks * num_slots;
  for (int slot = threadIdx.x; slot < num_slots; slot += kChunk) {
    int32_t total = 0;
    for (int64_t chunk = 0; chunk < sort.chunks; ++chunk) {
      const int32_t count = sort.chunk_counts[chunk * num_slots + slot];
      sort.chunk_counts[chunk * num_slots + slot] = total;
      total += count;
    }
    totals[slot] = total;
  }
  __syncthreads();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  static_assert(kWorkRows <= kChunk / kWarp, "a warp for each row");
  if (warp < kWorkRows) {
    const int rows = rows_of_work(warp);
    int32_t* begins = sort.work + warp * (num_slots + 1);
    int32_t before = 0;  // sum of all slots of earlier turns
    for (int64_t first = 0; first < num_slots; first += kWarp) {
      const int64_t slot = first + lane;
      const int32_t own = slot < num_slots ? static_cast<int32_t>(ceil_div(totals[slot], rows)) : 0;
      int32_t sum = own;  // of lanes 0 .. lane
      for (int by = 1; by < kWarp; by *= 2) {
        const int32_t left = __shfl_up_sync(~0u, sum, by);
        if (lane >= by) sum += left;
      }
      if (slot < num_slots) begins[slot] = before + sum - own;
      before += __shfl_sync(~0u, sum, kWarp - 1);
    }
    if (lane == 0) begins[num_slots] = before;
  }
  __syncthreads();
}

__device__ void place_chunk(const Sort& sort, int chunk, const int32_t* slots) {
  const int64_t pair = static_cast<int64_t>(chunk) * kChunk + threadIdx.x;
  if (pair >= sort.pairs) return;
  const int32_t slot = slots[threadIdx.x];
  if (slot < 0) {
    sort.place[pair] = -1;
    return;
  }
  int32_t rank = 0;  // equal slots before this pair, in its chunk
  for (int i = 0; i < static_cast<int>(threadIdx.x); ++i) rank += slots[i] == slot;
  const int32_t at =
      sort.work[slot] + sort.chunk_counts[static_cast<int64_t>(chunk) * sort.num_slots + slot] + rank;
  sort.place[pair] = at;
  sort.order[at] = static_cast<int32_t>(pair);
  sort.tokens[at] = static_cast<int32_t>(pair / sort.top_k);
}

// The steps as kernels, and all in one for a single chunk (decoding).
__global__ void __launch_bounds__(kChunk, 1) sort_count_kernel(const Sort sort) {
  __shared__ int32_t slots[kChunk];
  load_chunk(sort, blockIdx.x, slots);
  count_chunk(sort, blockIdx.x, slots);
}
__global__ void __launch_bounds__(kChunk, 1) sort_begins_kernel(const Sort sort) { make_begins(sort); }
__global__ void __launch_bounds__(kChunk, 1) sort_place_kernel(const Sort sort) {
  __shared__ int32_t slots[kChunk];
  load_chunk(sort, blockIdx.x, slots);
  place_chunk(sort, blockIdx.x, slots);
}
__global__ void __launch_bounds__(kChunk, 1) sort_few_kernel(const Sort sort) {
  __shared__ int32_t slots[kChunk];
  load_chunk(sort, 0, slots);
  count_chunk(sort, 0, slots);
  __syncthreads();
  make_begins(sort);
  place_chunk(sort, 0, slots);
}

// --- rows ---------------------------------------------------------------------------------------------------------

constexpr int kRowThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    combine_kernel(const T* rows, const int32_t* place, const float* weights, T* y, int64_t top_k, int64_t hidden) {
  const int64_t token = blockIdx.x;
  for (int64_t column = threadIdx.x; column < hidden; column += kRowThreads) {
    float sum = 0.0f;
    for (int64_t k = 0; k < top_k; ++k) {
      const int32_t at = place[token * top_k + k];
      if (at < 0) continue;
      const float value = to_float(rows[at * hidden + column]);
      sum += weights != nullptr ? weights[token * top_k + k] * value : value;
    }
    y[token * hidden + column] = from_float<T>(sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    spread_kernel(const T* y, const int32_t* order, const int32_t* tokens, const float* weights, const int32_t* kept,
                  T* rows, int64_t hidden) {
  const int64_t at = blockIdx.x;
  if (at >= *kept) return;
  const T* source = y + tokens[at] * hidden;
  const float weight = weights[order[at]];
  for (int64_t column = threadIdx.x; column < hidden; column += kRowThreads)
    rows[at * hidden + column] = from_float<T>(weight * to_float(source[column]));
}

// A warp for each position. Lanes add up every 32nd product; then neighbours, in a fixed tree.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    pair_dots_kernel(T* a, const T* b, const int32_t* b_rows, const int32_t* order, const float* weights,
                     const int32_t* kept, float* dots, int64_t width) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (at >= *kept) return;
  const int32_t pair = order[at];
  T* row = a + at * width;
  const T* other = b + (b_rows != nullptr ? b_rows[at] : at) * width;
  const float weight = weights != nullptr ? weights[pair] : 1.0f;
  float sum = 0.0f;
  for (int64_t column = lane; column < width; column += kWarp) {
    const float value = to_float(row[column]);
    sum += value * to_float(other[column]);
    if (weights != nullptr) row[column] = from_float<T>(weight * value);
  }
  for (int by = kWarp / 2; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
  if (lane == 0) dots[pair] = sum;
}

// A row is cut into pieces of kValues columns: eight if its halves are aligned, else one.
template <typename T, int kValues>
EF_DEVICE void load_piece(const T* from, float* out) {
  if constexpr (kValues == 8) {
    load_eight(from, out);
  } else {
    out[0] = to_float(*from);
  }
}
template <typename T, int kValues>
EF_DEVICE void store_piece(T* to, const float* values) {
  if constexpr (kValues == 8) {
    store_eight(to, values);
  } else {
    *to = from_float<T>(values[0]);
  }
}

EF_DEVICE float sigmoid_of(float value) { return 1.0f / (1.0f + expf(-value)); }

template <typename T, int kValues>
__global__ void __launch_bounds__(kRowThreads)
    swiglu_kernel(const T* gate_up, const int32_t* kept, T* hidden, int64_t width) {
  const int64_t at = blockIdx.x;
  if (at >= *kept) return;
  const T* row = gate_up + at * 2 * width;
  for (int64_t column = kValues * threadIdx.x; column < width; column += kValues * kRowThreads) {
    float gate[kValues], up[kValues];
    load_piece<T, kValues>(row + column, gate);
    load_piece<T, kValues>(row + width + column, up);
#pragma unroll
    for (int i = 0; i < kValues; ++i) up[i] *= gate[i] * sigmoid_of(gate[i]);
    store_piece<T, kValues>(hidden + at * width + column, up);
  }
}

// A warp for each position, as in pair_dots_kernel.
template <typename T, int kValues>
__global__ void __launch_bounds__(kRowThreads)
    swiglu_backward_kernel(const T* gate_up, const T* d, const int32_t* order, const float* weights,
                           const int32_t* kept, T* gate_up_grad, T* hidden, float* dots, int64_t width) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (at >= *kept) return;
  const int32_t pair = order[at];
  const float weight = weights[pair];
  float sum = 0.0f;
  for (int64_t column = kValues * lane; column < width; column += kValues * kWarp) {
    float gate[kValues], up[kValues], gradient[kValues];
    load_piece<T, kValues>(gate_up + at * 2 * width + column, gate);
    load_piece<T, kValues>(gate_up + at * 2 * width + width + column, up);
    load_piece<T, kValues>(d + at * width + column, gradient);
    float h[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float sigmoid = sigmoid_of(gate[i]), silu = gate[i] * sigmoid;
      h[i] = silu * up[i];
      sum += gradient[i] * h[i];
      gradient[i] *= weight;
      gate[i] = gradient[i] * up[i] * (sigmoid + silu * (1.0f - sigmoid));
      up[i] = gradient[i] * silu;
    }
    store_piece<T, kValues>(gate_up_grad + at * 2 * width + column, gate);
    store_piece<T, kValues>(gate_up_grad + at * 2 * width + width + column, up);
    if (hidden != nullptr) store_piece<T, kValues>(hidden + at * width + column, h);
  }
  for (int by = kWarp / 2; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
  if (lane == 0) dots[pair] = sum;
}

template <typename... Pointers>
bool in_eights(int64_t width, const Pointers*... pointers) {
  return width % 8 == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace
}  // namespace edgefed

using namespace edgefed;

extern "C" {

int32_t ef_cuda_abi_version(void) { return EF_CUDA_ABI_VERSION; }

int32_t ef_cuda_device_ready(int32_t device) {
  const OnDevice here(device);
  if (here.error() != 0) return here.error();
  cudaFuncAttributes attributes;
  const int32_t error = static_cast<int32_t>(cudaFuncGetAttributes(&attributes, sort_few_kernel));
  cudaGetLastError();  // the answer above is the only trace this leaves
  return error;
}

const char* ef_cuda_error_text(int32_t code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int64_t ef_cuda_work_size(int64_t num_slots) { return kWorkRows * (num_slots + 1); }

int64_t ef_cuda_sort_scratch(int64_t pairs, int64_t num_slots) { return (ceil_div(pairs, kChunk) + 1) * num_slots; }

int32_t ef_cuda_sort_pairs(const int64_t* slots, int64_t pairs, int64_t num_slots, int32_t top_k, int32_t* order,
                           int32_t* tokens, int32_t* place, int32_t* work, int32_t* scratch, int32_t device,
                           void* stream) {
  if (pairs < 0 || pairs > kMostBlocksX - kChunk || num_slots < 0 || num_slots > kMostBlocksX || top_k < 1)
    return EF_UNSUPPORTED;
  const OnDevice here(device);
  if (here.error() != 0) return here.error();
  const int32_t chunks = static_cast<int32_t>(ceil_div(pairs, kChunk));
  const Sort sort = {slots, static_cast<int32_t>(pairs), static_cast<int32_t>(num_slots), top_k, chunks,
                     order, tokens, place, work, scratch};
  if (chunks == 1) {
    EF_LAUNCH(sort_few_kernel, 1, kChunk, stream, sort);
    return launched();
  }
  if (chunks > 0) EF_LAUNCH(sort_count_kernel, chunks, kChunk, stream, sort);
  EF_LAUNCH(sort_begins_kernel, 1, kChunk, stream, sort);
  if (chunks > 0) EF_LAUNCH(sort_place_kernel, chunks, kChunk, stream, sort);
  return launched();
}

int32_t ef_cuda_combine(const void* rows, const int32_t* place, const float* weights, void* y, int32_t dtype,
                        int64_t tokens, int64_t top_k, int64_t hidden, int32_t device, void* stream) {
  if (tokens > kMostBlocksX) return EF_UNSUPPORTED;
  if (tokens <= 0 || hidden <= 0) return EF_OK;
  const OnDevice here(device);
  if (here.error() != 0) return here.error();
  return with_cuda_dtype(dtype, [&](auto type) -> int32_t {
    using T = decltype(type);
    EF_LAUNCH(combine_kernel<T>, static_cast<unsigned>(tokens), kRowThreads, stream, static_cast<const T*>(rows), place,
              weights, static_cast<T*>(y), top_k, hidden);
    return launched();
  });
}

int32_t ef_cuda_spread(const void* y, const int32_t* order, const int32_t* tokens, const float* weights,
                       const int32_t* work, int64_t num_slots, void* rows, int32_t dtype, int64_t pairs, int64_t hidden,
                       int32_t device, void* stream) {
  if (pairs > kMostBlocksX) return EF_UNSUPPORTED;
  if (pairs <= 0 || hidden <= 0) return EF_OK;
  const OnDevice here(device);
  if (here.error() != 0) return here.error();
  return with_cuda_dtype(dtype, [&](auto type) -> int32_t {
    using T = decltype(type);
    EF_LAUNCH(spread_kernel<T>, static_cast<unsigned>(pairs), kRowThreads, stream, static_cast<const T*>(y), order,
              tokens, weights, positions_of(work) + num_slots, static_cast<T*>(rows), hidden);
    return launched();
  });
}

int32_t ef_cuda_pair_dots(void* a, const void* b, const int32_t* b_rows, const int32_t* order, const float* weights,
                          const int32_t* work, int64_t num_slots, float* dots, int32_t dtype, int64_t pairs,
                          int64_t width, int32_t device, void* stream) {
  if (pairs > kMostBlocksX) return EF_UNSUPPORTED;
  if (pairs <= 0) return EF_OK;
  const OnDevice here(device);
  if (here.error() != 0) return here.error();
  return with_cuda_dtype(dtype, [&](auto type) -> int32_t {
    using T = decltype(type);
    const auto blocks = static_cast<unsigned>(ceil_div(pairs, kRowThreads / kWarp));
    EF_LAUNCH(pair_dots_kernel<T>, blocks, kRowThreads, stream, static_cast<T*>(a), static_cast<const T*>(b), b_rows,
              order, weights, positions_of(work) + num_slots, dots, width);
    return launched();
  });
}

int32_t ef_cuda_swiglu(const void* gate_up, const int32_t* work, int64_t num_slots, void* hidden, int32_t dtype,
                       int64_t pairs, int64_t width, int32_t device, void* stream) {
  if (pairs > kMostBlocksX) return EF_UNSUPPORTED;
  if (pairs <= 0 || width <= 0) return EF_OK;
  const OnDevice here(device);
  if (here.error() != 0) return here.error();
  return with_cuda_dtype(dtype, [&](auto type) -> int32_t {
    using T = decltype(type);
    const auto kernel = in_eights(width, gate_up, hidden) ? swiglu_kernel<T, 8> : swiglu_kernel<T, 1>;
    EF_LAUNCH(kernel, static_cast<unsigned>(pairs), kRowThreads, stream, static_cast<const T*>(gate_up),
              positions_of(work) + num_slots, static_cast<T*>(hidden), width);
    return launched();
  });
}

int32_t ef_cuda_swiglu_backward(const void* gate_up, const void* d, const int32_t* order, const float* weights,
                                const int32_t* work, int64_t num_slots, void* gate_up_grad, void* hidden, float* dots,
                                int32_t dtype, int64_t pairs, int64_t width, int32_t device, void* stream) {
  if (pairs > kMostBlocksX) return EF_UNSUPPORTED;
  if (pairs <= 0) return EF_OK;
  const OnDevice here(device);
  if (here.error() != 0) return here.error();
  return with_cuda_dtype(dtype, [&](auto type) -> int32_t {
    using T = decltype(type);
    const auto kernel = in_eights(width, gate_up, d, gate_up_grad, hidden) ? swiglu_backward_kernel<T, 8>
                                                                           : swiglu_backward_kernel<T, 1>;
    const auto blocks = static_cast<unsigned>(ceil_div(pairs, kRowThreads / kWarp));
    EF_LAUNCH(kernel, blocks, kRowThreads, stream, static_cast<const T*>(gate_up), static_cast<const T*>(d), order,
              weights, positions_of(work) + num_slots, static_cast<T*>(gate_up_grad), static_cast<T*>(hidden), dots,
              width);
    return launched();
  });
}

}  // extern "C"
