// Tasks on the threads of the one OpenMP runtime in the process, which library.cpp is told of.
#pragma once

#include <cstdint>

// Run task(context, index, worker) for every index below count; workers are numbered from 0 to threads - 1.
void run_tasks(int64_t count, int64_t threads, void (*task)(void *, int64_t, int), void *context);
