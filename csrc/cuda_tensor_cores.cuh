// Copies into shared memory without registers (cp.async, from sm_80), and two instructions of a warp: ldmatrix, and
// mma.sync of 16 x 8 x 16 (on sm_75 two of 16 x 8 x 8). Their layouts of registers are documented ("Warp-level matrix instructions" of the PTX manual), so results leave without a detour.
#pragma once

#include "cuda_device.cuh"

#ifdef EF_CUDA_EMULATED
#include <tensor_cores.h>
#endif

namespace edgefed {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kCopiesAsync = false;
#else
constexpr bool kCopiesAsync = true;
#endif

// Begins to copy 16 bytes into shared memory, zeros unless `is_there`; both ends are aligned. They are there for this
// thread after wait_for_copies, for others after the barrier behind it.
EF_DEVICE void begin_copy(void* to, const void* from, bool is_there) {
#ifdef EF_CUDA_EMULATED
  emulator::begin_copy(to, from, is_there);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(is_there ? 16 : 0)
               : "memory");
#endif
}
EF_DEVICE void wait_for_copies() {
#ifdef EF_CUDA_EMULATED
  emulator::wait_for_copies();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Loads four 8 x 8 matrices of 16-bit values from shared memory: lane 8 i + r has the address of row r of matrix i,
// 16-byte aligned. Of each matrix a lane gets two neighbours of row lane / 4; kTransposed: of column lane / 4.
template <bool kTransposed, typename T>
EF_DEVICE void load_matrices(const T* row, uint32_t (&out)[4]) {
#ifdef EF_CUDA_EMULATED
  emulator::load_matrices<kTransposed>(row, out);
#elif defined(__CUDA_ARCH__)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// c (16 x 8) += a (16 x 16) b (16 x 8). Lane l holds c of row l / 4 and, in c[2], c[3], of the row 8 below, columns
// 2 (l % 4) and the next.
template <typename T>
EF_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef EF_CUDA_EMULATED
  emulator::multiply_add<T>(c, a, b);
#elif defined(__CUDA_ARCH__)
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; ++half)
      asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
  }
#endif
}

}  // namespace edgefed
