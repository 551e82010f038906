// Work on several threads. Torch loads an OpenMP runtime into the process; if one is loaded, its threads are used, so
// that no second pool competes with torch's for the same cores. Otherwise threads are started for the call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgefed {

using Task = void (*)(void* context, int64_t task);

// Calls run(context, task) for every task < tasks, each once, on at most `threads` threads. Which thread takes which
// task is not fixed: a task must write nothing that another one reads.
void run_tasks(int64_t tasks, int32_t threads, Task run, void* context);

template <typename Body>
inline void parallel(int64_t tasks, int32_t threads, Body body) {
  run_tasks(tasks, threads, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

// Requests the pages of memory that is about to be written, all at once: otherwise a large new result takes as long in
// page faults as in arithmetic. The system clears them, 3 GB/s on one thread. (Large pages would be
// fewer, but in fragmented memory the kernel compacts it first, which took longer than everything else.)
void expect_writes(void* begin, size_t bytes, int32_t threads);

// A buffer of the calling thread, 64-byte aligned, that keeps its memory for the next call; NULL without memory.
// `which` distinguishes the buffers that one task needs at the same time.
void* scratch(int which, size_t bytes);
constexpr int kScratchBuffers = 6;

}  // namespace edgefed
