// What exists once, whatever the level of instructions.
#include <atomic>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "parallel.h"

namespace {

using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

// GOMP_parallel of the OpenMP runtime that PyTorch has loaded. Linking with one would risk a second beside it.
std::atomic<Parallel> parallel{nullptr};

struct Crew {
  int64_t count;
  void (*task)(void *, int64_t, int);
  void *context;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};
};

void work(void *argument) {
  Crew &crew = *static_cast<Crew *>(argument);
  const int worker = crew.workers++;
  for (int64_t index; (index = crew.next++) < crew.count;) crew.task(crew.context, index, worker);
}

}  // namespace

void run_tasks(int64_t count, int64_t threads, void (*task)(void *, int64_t, int), void *context) {
  Crew crew;
  crew.count = count, crew.task = task, crew.context = context;
  const Parallel start = parallel;
  if (threads > count) threads = count;
  if (threads > 1 && start)
    start(work, &crew, static_cast<unsigned>(threads), 0);
  else
    work(&crew);
}

extern "C" __attribute__((visibility("default"))) void flowformer_set_parallel(void *gomp_parallel) {
  parallel = reinterpret_cast<Parallel>(gomp_parallel);
}

// Ask for large pages for memory that nobody has written to yet: filling it page by page would take a third of the time
// of a long forward pass.
extern "C" __attribute__((visibility("default"))) void flowformer_want_large_pages(void *memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t LARGE = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + LARGE - 1) / LARGE * LARGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / LARGE * LARGE;
  if (begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

extern "C" __attribute__((visibility("default"))) int flowformer_cpu_supports(const char *level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!strcmp(level, "avx2")) return avx2;
  if (!strcmp(level, "avx512"))
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return !strcmp(level, "portable");
}
