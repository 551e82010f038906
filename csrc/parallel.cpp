#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace edgefed {
namespace {

struct Job {
  std::atomic<int64_t> next{0};
  int64_t tasks;
  Task run;
  void* context;
};

void work(void* opaque) {
  Job* job = static_cast<Job*>(opaque);
  for (int64_t task; (task = job->next.fetch_add(1, std::memory_order_relaxed)) < job->tasks;)
    job->run(job->context, task);
}

// The entry of GNU OpenMP, which LLVM's runtime also has: start `threads` threads in fn(data) and wait for them.
using GompParallel = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

GompParallel find_openmp() {
#if defined(_WIN32)
  return nullptr;
#else
  // Not remembered when absent: torch may be imported later.
  static std::atomic<GompParallel> found{nullptr};
  GompParallel entry = found.load(std::memory_order_acquire);
  if (entry == nullptr) {
    entry = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(entry, std::memory_order_release);
  }
  return entry;
#endif
}

struct Buffers {
  void* data[kScratchBuffers] = {};
  size_t size[kScratchBuffers] = {};
  ~Buffers() {
    for (void* buffer : data) std::free(buffer);
  }
};

}  // namespace

void run_tasks(int64_t tasks, int32_t threads, Task run, void* context) {
  if (threads > tasks) threads = static_cast<int32_t>(tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) run(context, task);
    return;
  }
  Job job;
  job.tasks = tasks;
  job.run = run;
  job.context = context;
  if (GompParallel openmp = find_openmp()) {
    openmp(work, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    for (int32_t i = 1; i < threads; ++i) others.emplace_back(work, &job);
  } catch (...) {  // no more threads: those that are there do it all
  }
  work(&job);
  for (std::thread& other : others) other.join();
}

void expect_writes(void* begin, size_t bytes, int32_t threads) {
#if defined(__linux__)
#if !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23  // Linux 5.14; an older kernel refuses it, and nothing changes
#endif
  constexpr uintptr_t kPage = 4096;
  constexpr size_t kWorthIt = 1 << 18, kPart = 1 << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / kPage * kPage;
  if (bytes < kWorthIt) return;
  parallel(static_cast<int64_t>((last - first + kPart - 1) / kPart), threads, [&](int64_t part) {
    const uintptr_t from = first + static_cast<uintptr_t>(part) * kPart, to = last - from < kPart ? last : from + kPart;
    (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_POPULATE_WRITE);
  });
#else
  (void)begin, (void)bytes, (void)threads;
#endif
}

void* scratch(int which, size_t bytes) {
  static thread_local Buffers buffers;
  if (buffers.size[which] < bytes) {
    std::free(buffers.data[which]);
    buffers.size[which] = (bytes + 4095) / 4096 * 4096;
    buffers.data[which] = std::aligned_alloc(4096, buffers.size[which]);
    if (buffers.data[which] == nullptr) buffers.size[which] = 0;
  }
  return buffers.data[which];
}

}  // namespace edgefed
