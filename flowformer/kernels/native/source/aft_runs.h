// Who computes what of AFT-simple: a task for each block of channels of each sequence.
#pragma once

#include "aft.h"
#include "runs.h"

namespace {

// Blocks start at multiples of this: two threads then write to other lines of the caches.
constexpr int64_t CHANNELS = 32;

// Channels of a block: as many as a task can take, but enough blocks for the threads.
inline int64_t block_size(const AftCall &call, int64_t widest) {
  const int64_t groups = (call.channels + CHANNELS - 1) / CHANNELS;
  const int64_t wanted = call.batch > 0 ? (call.threads + call.batch - 1) / call.batch : 1;  // of each sequence
  const int64_t size = (groups + wanted - 1) / wanted * CHANNELS;
  return size < widest ? size : widest;
}

template <class Task>
struct AftRun {
  const AftCall &call;
  const int64_t size, blocks;  // channels of a block, blocks of a sequence
  std::atomic<bool> failed{false};

  explicit AftRun(const AftCall &call)
      : call(call), size(block_size(call, Task::WIDEST)), blocks((call.channels + size - 1) / size) {}

  int run() {
    run_tasks(
        call.batch * blocks, call.threads,
        [](void *context, int64_t index, int) {
          AftRun &run = *static_cast<AftRun *>(context);
          if (!with_scratch([&](Scratch &scratch, bool real) { run.run_block(index, scratch, real); }))
            run.failed = true;
        },
        this);
    return failed ? 1 : 0;
  }

  void run_block(int64_t index, Scratch &scratch, bool real) const {
    const int64_t first = index % blocks * size;
    const int64_t count = first + size < call.channels ? size : call.channels - first;
    Task task(call, {index / blocks, first, (int)count}, scratch);
    if (real) task.run();
  }
};

template <template <class> class Task>
int run_aft(const AftCall &call) {
  return call.half ? AftRun<Task<bfloat16>>(call).run() : AftRun<Task<float>>(call).run();
}

}  // namespace
