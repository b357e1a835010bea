// Who computes what of the bidirectional form with decay: heads are distributed over threads. Where they compete, all
// go through each stage together.
#pragma once

#include "bidirectional_decay_backward.h"
#include "runs.h"

namespace {

template <class T>
struct BidirectionalDecayRun {
  // Competition over heads comes between the first two, and its derivative between the last.
  enum HeadStage { FIND_FLOWS, PRODUCTS_OF_HEAD, SUMS_OF_HEAD };
  const FlowCall &call;
  const int keys, values;
  const bool backward;
  DecayedHead *together = nullptr;
  HeadStage stage = FIND_FLOWS;
  std::atomic<bool> failed{false};

  BidirectionalDecayRun(const FlowCall &call, bool backward)
      : call(call), keys(padded(call.key_channels)), values(padded(call.value_channels)), backward(backward) {}

  int64_t tokens(int64_t index) const { return call.sinks.rows[3 * (index / call.heads) + 2]; }
  int64_t heads() const { return call.sequences * call.heads; }

  void run() {
    if (call.competition != HEADS)
      return each_head([](void *context, int64_t index, int) {
        BidirectionalDecayRun &run = *static_cast<BidirectionalDecayRun *>(context);
        if (!with_scratch([&](Scratch &scratch, bool real) { run.whole_head(index, scratch, real); }))
          run.failed = true;
      });
    if (!with_scratch([&](Scratch &scratch, bool real) { heads_together(scratch, real); })) failed = true;
  }

  void each_head(void (*task)(void *, int64_t, int)) { run_tasks(heads(), call.threads, task, this); }

  void whole_head(int64_t index, Scratch &scratch, bool real) {
    DecayedHead head(call, tokens(index), keys, call.value_channels, backward, scratch);
    if (!real) return one_stage(PRODUCTS_OF_HEAD, index, head, scratch, false);  // it takes the most
    for (HeadStage next : {FIND_FLOWS, PRODUCTS_OF_HEAD, SUMS_OF_HEAD}) {
      Scratch rest = scratch;  // the same for every stage
      one_stage(next, index, head, rest, true);
    }
  }

  void one_stage(HeadStage next, int64_t index, DecayedHead &head, Scratch &scratch, bool real) {
    const WithoutDenormals guard(true);
    BidirectionalDecayBackward worker(call, scratch);
    const bool products = next == PRODUCTS_OF_HEAD;
    const int64_t matrix = products ? call.key_channels * call.value_channels : 0;
    Memory memory = backward ? Memory(call.value_channels, call.key_channels, values, keys, scratch)
                             : Memory(call.key_channels, call.value_channels, keys, values, scratch);
    Memory growth(call.key_channels, call.value_channels, keys, values, scratch);
    double *memory_sum = scratch.take<double>(matrix), *growth_sum = scratch.take<double>(matrix);
    double *past = scratch.take<double>(backward ? tokens(index) : 0);
    if (!real || head.tokens == 0) return;
    worker.prepare();
    const int64_t s = index / call.heads, h = index % call.heads;
    const auto log_decay = rows_of<const float>(call.log_decay, call.sinks, s, h);
    if (next == FIND_FLOWS) {
      worker.load_head<T>(s, h, head);
      worker.find_flows(log_decay, head);
    } else if (products && !backward) {
      worker.outputs(log_decay, head, memory, memory_sum);
      worker.write_outputs(rows_of<T>(call.out, call.sinks, s, h), head);
    } else if (products) {
      worker.products(log_decay, head, memory, memory_sum, growth, growth_sum), worker.finish_products(head);
    } else if (backward) {
      if (call.competition == SEQUENCE) worker.compete_backward(log_decay, head, past);
      worker.sums_backward(log_decay, head);
      worker.write_inputs<T>(s, h, head);
      if (worker.wanted) worker.write_decay(log_decay, rows_of<float>(call.grad_log_decay, call.sinks, s, h), head);
    }
  }

  void heads_together(Scratch &scratch, bool real) {
    together = scratch.take<DecayedHead>(heads());
    for (int64_t index = 0; index < heads(); index++) {
      const DecayedHead head(call, tokens(index), keys, call.value_channels, backward, scratch);
      if (real) new (together + index) DecayedHead(head);
    }
    if (!real) return;
    for (HeadStage next : {FIND_FLOWS, PRODUCTS_OF_HEAD, SUMS_OF_HEAD}) {
      stage = next;
      each_head([](void *context, int64_t index, int) {
        BidirectionalDecayRun &run = *static_cast<BidirectionalDecayRun *>(context);
        if (!with_scratch(
                [&](Scratch &own, bool real) { run.one_stage(run.stage, index, run.together[index], own, real); }))
          run.failed = true;
      });
      for (int64_t s = 0; s < call.sequences && next != SUMS_OF_HEAD; s++) compete_over_heads(s);
    }
  }

  void compete_over_heads(int64_t sequence) const {
    DecayedHead *of = together + sequence * call.heads;
    for (int64_t t = 0; t < of->tokens; t++) {
      const auto count = [&](int64_t h) { return (double)of[h].n[t]; };
      const auto weight = [&](int64_t h) -> float & { return of[h].weight[t]; };
      const auto grad = [&](int64_t h) -> float & { return of[h].grad_flow[t]; };
      if (stage == FIND_FLOWS)
        softmax_over_heads(call.heads, count, weight);
      else if (backward)
        softmax_gradient(call.heads, count, weight, grad);
    }
  }
};

}  // namespace
