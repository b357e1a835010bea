// Who computes what of the causal form: heads in bundles, each in one pass; or, where heads compete or threads
// outnumber heads, in stages over segments of the sequences.
#pragma once

#include "causal_backward.h"
#include "runs.h"

namespace {

inline void copy_or_zero(double *to, const double *from, int64_t count) {
  if (from)
    memcpy(to, from, sizeof(double) * count);
  else
    memset(to, 0, sizeof(double) * count);
}

template <class T, int KEYS>
struct CausalRun {
  const FlowCall &call;
  const int keys, values;
  const int64_t matrix;
  std::atomic<bool> failed{false};

  explicit CausalRun(const FlowCall &call)
      : call(call),
        keys(padded(call.key_channels)),
        values(padded(call.value_channels)),
        matrix(call.key_channels * call.value_channels) {}

  int64_t tokens(int64_t sequence) const { return call.sinks.rows[3 * sequence + 2]; }
  int64_t heads() const { return call.sequences * call.heads; }
  double before(int64_t index) const { return call.before.count ? call.before.count[index] : 0.; }

  struct Head {
    Past past;
    Memory memory;
    Head(const CausalRun &run, Scratch &scratch)
        : past(run.keys, scratch),
          memory(run.call.key_channels, run.call.value_channels, run.keys, run.values, scratch) {}
  };

  void read_past(Past &past, int64_t index) const { past.read(call.before, index, call.key_channels, keys); }

  void start_memory(Memory &memory, double *sum, int64_t index) const {
    if (!call.before.memory) return memory.start_from_zero(sum);
    memcpy(sum, call.before.memory + index * matrix, sizeof(double) * matrix);
    memory.start(sum);
  }

  void write_past(const Past &past, int64_t index) const {
    past.write(call.after.sums + index * 4 * call.key_channels, call.key_channels);
    call.after.log_normaliser[index] =
        call.competition == SEQUENCE || !call.before.sums ? past.log_normaliser() : call.before.log_normaliser[index];
    call.after.count[index] = past.count;
  }

  // ---------------------------------------------------------------------------------------------- forward, in one pass

  void forward() {
    run_tasks(
        call.sequences * bundles(call), call.threads,
        [](void *context, int64_t task, int) {
          CausalRun &run = *static_cast<CausalRun *>(context);
          if (!with_scratch([&](Scratch &scratch, bool real) { run.forward_bundle(task, scratch, real); }))
            run.failed = true;
        },
        this);
  }

  void forward_bundle(int64_t task, Scratch &scratch, bool real) {
    const WithoutDenormals guard(call.log_decay.data);
    const auto [sequence, first, count] = bundle_of(call, task);
    Causal<T, KEYS> worker(call, scratch);
    Head *head = scratch.take<Head>(count);
    for (int64_t h = 0; h < count; h++) {
      if (!real) {
        Head(*this, scratch);
        continue;
      }
      const int64_t index = sequence * call.heads + first + h;
      new (head + h) Head(*this, scratch);
      read_past(head[h].past, index);
      start_memory(head[h].memory, call.after.memory + index * matrix, index);
    }
    if (!real) return;
    worker.prepare();
    const int64_t length = tokens(sequence);
    for (int64_t at = 0; at < length; at += CHUNK)
      for (int64_t h = 0; h < count; h++) {
        const bool last = h + 1 == count;
        const typename Causal<T, KEYS>::Place place(call, sequence, first + h, at, length);
        const typename Causal<T, KEYS>::Place next(call, sequence, first + (last ? 0 : h + 1), last ? at + CHUNK : at,
                                                   length);
        worker.past = &head[h].past;
        worker.chunk(place, next, OUTPUT, head[h].memory, nullptr);
      }
    for (int64_t h = 0; h < count; h++) {
      head[h].memory.flush();
      write_past(head[h].past, sequence * call.heads + first + h);
    }
  }

  // --------------------------------------------------------------------------------------------- backward, in two
  // passes

  void backward() {
    run_tasks(
        heads(), call.threads,
        [](void *context, int64_t index, int) {
          CausalRun &run = *static_cast<CausalRun *>(context);
          if (!with_scratch([&](Scratch &scratch, bool real) { run.backward_head(index, scratch, real); }))
            run.failed = true;
        },
        this);
  }

  void backward_head(int64_t index, Scratch &scratch, bool real) {
    const WithoutDenormals guard(call.log_decay.data);
    const int64_t sequence = index / call.heads, head = index % call.heads, length = tokens(sequence);
    CausalBackward<T, KEYS> worker(call, scratch);
    Past past(keys, scratch);
    Future future(keys, scratch);
    Memory memory(call.value_channels, call.key_channels, values, keys, scratch);
    Memory growth(call.key_channels, call.value_channels, keys, values, scratch);
    double *sum = scratch.take<double>(matrix);
    Records records(call, length, keys, matrix, scratch);
    if (!real) return;
    worker.prepare();
    worker.past = &past;
    read_past(past, index);
    memory.across = true;
    start_memory(memory, sum, index);
    worker.recompute(sequence, head, 0, length, memory, records, nullptr);
    double *last = call.grad_before.memory + index * matrix;  // becomes that of the first state
    read_future(future, last, index);
    if (call.grad_after.memory)
      growth.start(last);
    else
      growth.start_from_zero(last);
    worker.against_time(sequence, head, 0, length, INPUTS, false, growth, future, records, before(index));
    growth.flush();
    finish_decay(future, index, records);
    write_future(future, index);
  }

  // The gradients of log-decays, and of the count before the first token.
  void finish_decay(Future &future, int64_t index, const Records &records) const {
    const int64_t sequence = index / call.heads, head = index % call.heads;
    if (!records.wanted) return;
    const auto log_decay = rows_of<const float>(call.log_decay, call.sinks, sequence, head);
    const auto out = rows_of<float>(call.grad_log_decay, call.sinks, sequence, head);
    future.count = write_decay_gradient(log_decay, out, tokens(sequence), future.count, records);
  }

  // What is wanted of the last state.
  void read_future(Future &future, double *growth, int64_t index) const {
    const double *sums = call.grad_after.sums ? call.grad_after.sums + index * 4 * call.key_channels : nullptr;
    for (int i = 0; i < 4; i++)
      for (int x = 0; x < keys; x++)
        future.sums[i][x] = sums && x < call.key_channels ? sums[i * call.key_channels + x] : 0.;
    future.count = call.grad_after.count && call.grad_log_decay.data ? call.grad_after.count[index] : 0.;
    future.normaliser = call.grad_after.log_normaliser ? call.grad_after.log_normaliser[index] : 0.;
    copy_or_zero(growth, call.grad_after.memory ? call.grad_after.memory + index * matrix : nullptr, matrix);
  }

  void write_future(const Future &future, int64_t index) const {
    for (int i = 0; i < 4; i++)
      memcpy(call.grad_before.sums + (index * 4 + i) * call.key_channels, future.sums[i],
             sizeof(double) * call.key_channels);
    call.grad_before.log_normaliser[index] = future.normaliser;
    call.grad_before.count[index] = future.count;
  }
};

}  // namespace
