// Who computes what of linear attention of features: heads are distributed over threads.
#pragma once

#include "attend_both.h"
#include "attend_decay.h"
#include "runs.h"

namespace {

// States are sum K (sequences, heads, key channels), in State::sums and only where outputs are divided, and the memory.
template <class T>
struct AttendRun {
  const AttendCall &attend;
  const FlowCall &call;
  const int keys, values;
  const int64_t matrix;
  std::atomic<bool> failed{false};

  explicit AttendRun(const AttendCall &attend)
      : attend(attend),
        call(attend.flow),
        keys(padded(call.key_channels)),
        values(padded(call.value_channels)),
        matrix(call.key_channels * call.value_channels) {}

  int64_t tokens(int64_t sequence) const { return call.sinks.rows[3 * sequence + 2]; }

  // A task of work(run, task, scratch, real) for each of so many.
  template <void (AttendRun::*WORK)(int64_t, Scratch &, bool)>
  void each(int64_t count) {
    run_tasks(
        count, call.threads,
        [](void *context, int64_t task, int) {
          AttendRun &run = *static_cast<AttendRun *>(context);
          if (!with_scratch([&](Scratch &scratch, bool real) { (run.*WORK)(task, scratch, real); })) run.failed = true;
        },
        this);
  }

  void causal(bool backward) {
    if (backward)
      each<&AttendRun::causal_backward>(call.sequences * call.heads);
    else
      each<&AttendRun::causal_forward>(call.sequences * bundles(call));
  }

  void both(bool backward) {
    const int64_t heads = call.sequences * call.heads;
    if (call.log_decay.data)
      backward ? each<&AttendRun::decay_backward>(heads) : each<&AttendRun::decay_forward>(heads);
    else
      backward ? each<&AttendRun::both_backward>(heads) : each<&AttendRun::both_forward>(heads);
  }

  // ----------------------------------------------------------------------------------------------------------- causal

  struct Head {
    Memory memory;
    double *sums;
    TokenFactors factors;

    Head(const AttendRun &run, int64_t sequence, int64_t head, Scratch &scratch)
        : memory(run.call.key_channels, run.call.value_channels, run.keys, run.values, scratch),
          sums(scratch.take<double>(run.keys)),
          factors(run.attend, sequence, head) {}
  };

  void start(Head &head, int64_t index) const {
    double *sum = call.after.memory + index * matrix;
    for (int x = 0; x < keys; x++)
      head.sums[x] = call.before.sums && x < call.key_channels ? call.before.sums[index * call.key_channels + x] : 0.;
    if (!call.before.memory) return head.memory.start_from_zero(sum);
    memcpy(sum, call.before.memory + index * matrix, sizeof(double) * matrix);
    head.memory.start(sum);
  }

  void causal_forward(int64_t task, Scratch &scratch, bool real) {
    const WithoutDenormals guard(call.log_decay.data);
    const auto [sequence, first, count] = bundle_of(call, task);
    Attend<T> worker(attend, scratch);
    Head *head = scratch.take<Head>(count);
    for (int64_t h = 0; h < count; h++) {
      const Head made(*this, sequence, first + h, scratch);
      if (real) start(*new (head + h) Head(made), sequence * call.heads + first + h);
    }
    if (!real) return;
    worker.prepare();
    using Place = typename Causal<T, 0>::Place;
    const int64_t length = tokens(sequence);
    for (int64_t at = 0; at < length; at += CHUNK)
      for (int64_t h = 0; h < count; h++) {
        const bool last = h + 1 == count;
        const Place place(call, sequence, first + h, at, length);
        const Place next(call, sequence, first + (last ? 0 : h + 1), last ? at + CHUNK : at, length);
        worker.chunk(place, next, head[h].factors, head[h].memory, head[h].sums);
      }
    for (int64_t h = 0; h < count; h++) {
      head[h].memory.flush();
      if (attend.divides)
        memcpy(call.after.sums + (sequence * call.heads + first + h) * call.key_channels, head[h].sums,
               sizeof(double) * call.key_channels);
    }
  }

  void causal_backward(int64_t index, Scratch &scratch, bool real) {
    const WithoutDenormals guard(call.log_decay.data);
    const int64_t sequence = index / call.heads, h = index % call.heads, length = tokens(sequence);
    AttendBackward<T> worker(attend, length, attend.divides, scratch);
    const int64_t columns = worker.columns;
    Memory memory(columns, call.key_channels, worker.values, keys, scratch);
    Memory growth(call.key_channels, columns, keys, worker.values, scratch);
    double *sum = scratch.take<double>(call.key_channels * columns);
    Records records(call, length, keys, call.key_channels * columns, scratch);
    if (!real) return;
    worker.prepare();
    const TokenFactors factors(attend, sequence, h);
    read(call.before, index, columns, sum);
    memory.across = true;
    memory.start(sum);
    worker.recompute(sequence, h, length, factors, memory, records);
    read(call.grad_after, index, columns, sum);
    growth.start(sum);
    worker.against_time(sequence, h, length, factors, growth, records);
    growth.flush();
    write(sum, index, columns);
    if (!records.wanted) return;
    memset(records.past_count, 0, sizeof(float) * length);
    write_decay_gradient(rows_of<const float>(call.log_decay, call.sinks, sequence, h),
                         rows_of<float>(call.grad_log_decay, call.sinks, sequence, h), length, 0., records);
  }

  // A state, or the gradient of one, as a matrix with a column for the sums.
  void read(const State &state, int64_t index, int64_t columns, double *sum) const {
    const int64_t width = call.value_channels;
    for (int64_t d = 0; d < call.key_channels; d++) {
      const int64_t row = index * call.key_channels + d;
      for (int64_t x = 0; x < width; x++) sum[d * columns + x] = state.memory ? state.memory[row * width + x] : 0.;
      if (columns > width) sum[d * columns + width] = state.sums ? state.sums[row] : 0.;
    }
  }

  void write(const double *sum, int64_t index, int64_t columns) const {
    const int64_t width = call.value_channels;
    for (int64_t d = 0; d < call.key_channels; d++) {
      const int64_t row = index * call.key_channels + d;
      memcpy(call.grad_before.memory + row * width, sum + d * columns, sizeof(double) * width);
      if (columns > width) call.grad_before.sums[row] = sum[d * columns + width];
    }
  }

  // ---------------------------------------------------------------------------------------------------- bidirectional

  void both_forward(int64_t index, Scratch &scratch, bool real) {
    AttendBoth<T> worker(attend, scratch, false);
    Memory memory(call.key_channels, call.value_channels, keys, values, scratch);
    double *sum = scratch.take<double>(matrix), *sums = scratch.take<double>(keys);
    if (!real) return;
    worker.prepare();
    worker.forward(typename AttendBoth<T>::Sides(attend, index / call.heads, index % call.heads), memory, sum, sums);
  }

  void both_backward(int64_t index, Scratch &scratch, bool real) {
    AttendBoth<T> worker(attend, scratch, true);
    const int64_t columns = worker.columns;
    Memory memory(columns, call.key_channels, worker.values, keys, scratch);
    Memory growth(call.key_channels, columns, keys, worker.values, scratch);
    double *sum = scratch.take<double>(call.key_channels * columns);
    double *growth_sum = scratch.take<double>(call.key_channels * columns);
    if (!real) return;
    worker.prepare();
    worker.backward(typename AttendBoth<T>::Sides(attend, index / call.heads, index % call.heads), memory, sum, growth,
                    growth_sum);
  }

  void decay_forward(int64_t index, Scratch &scratch, bool real) { decayed(index, scratch, real, false); }
  void decay_backward(int64_t index, Scratch &scratch, bool real) { decayed(index, scratch, real, true); }

  void decayed(int64_t index, Scratch &scratch, bool real, bool backward) {
    const WithoutDenormals guard(true);
    const int64_t sequence = index / call.heads, h = index % call.heads;
    AttendDecay worker(attend, scratch);
    const int64_t columns = worker.columns;
    DecayedHead head(call, tokens(sequence), keys, columns, backward, scratch);
    Memory memory(columns, call.key_channels, worker.values, keys, scratch);
    Memory growth(call.key_channels, columns, keys, worker.values, scratch);
    double *sum = scratch.take<double>(call.key_channels * columns);
    double *growth_sum = scratch.take<double>(call.key_channels * columns);
    if (!real || head.tokens == 0) return;
    worker.prepare();
    const TokenFactors factors(attend, sequence, h);
    const auto log_decay = rows_of<const float>(call.log_decay, call.sinks, sequence, h);
    worker.load<T>(sequence, h, factors, head);
    worker.outputs(log_decay, head, growth, growth_sum);
    worker.find_gates(factors, head);
    if (!backward) return worker.write_outputs(rows_of<T>(call.out, call.sinks, sequence, h), head);
    worker.gates_backward(rows_of<float>(attend.grad_scale, call.sinks, sequence, h), head);
    worker.products(log_decay, head, memory, sum, growth, growth_sum);
    worker.finish<T>(sequence, h, factors, head);
    worker.write_inputs<T>(sequence, h, head);
    if (!worker.wanted) return;
    const auto out = rows_of<float>(call.grad_log_decay, call.sinks, sequence, h);
    for (int64_t t = 0; t < head.tokens; t++) *out.at(t) = *log_decay.at(t) > 0 ? 0.f : head.crossing[t];
  }
};

}  // namespace
