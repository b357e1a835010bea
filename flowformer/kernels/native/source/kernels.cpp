// The functions that Python calls, for one level of instructions. Each returns 0, or 1 if there was no memory.
#include "aft_runs.h"
#include "attend_runs.h"
#include "attend_step.h"
#include "bidirectional_decay_runs.h"
#include "bidirectional_runs.h"
#include "causal_pieces.h"
#include "step.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define EXPORT(name) extern "C" __attribute__((visibility("default"))) int JOIN(name, FLOWFORMER_LEVEL)

namespace {

// Call body with a type of elements and, where it is a common one, the number of vectors in a key.
template <template <class, int> class Run, class Body>
int dispatch(const FlowCall &call, Body body) {
  const auto run = [&](auto &&of) {
    body(of);
    return of.failed ? 1 : 0;
  };
  if (call.half) return run(Run<bfloat16, 0>(call));
  if (call.key_channels == 64) return run(Run<float, 64 / LANES>(call));
  return run(Run<float, 0>(call));
}

int attend(const AttendCall &call, bool causal, bool backward) {
  const auto run = [&](auto &&of) {
    causal ? of.causal(backward) : of.both(backward);
    return of.failed ? 1 : 0;
  };
  return call.flow.half ? run(AttendRun<bfloat16>(call)) : run(AttendRun<float>(call));
}

int bidirectional(const FlowCall &call, bool backward) {
  const auto decayed = [&](auto &&run) {
    run.run();
    return run.failed ? 1 : 0;
  };
  if (call.log_decay.data && call.half) return decayed(BidirectionalDecayRun<bfloat16>(call, backward));
  if (call.log_decay.data) return decayed(BidirectionalDecayRun<float>(call, backward));
  return dispatch<BidirectionalRun>(call, [=](auto &run) { run.run(backward); });
}

}  // namespace

EXPORT(flowformer_causal_forward)(const FlowCall *call) {
  return dispatch<CausalPieces>(*call, [](auto &run) { run.wanted() ? run.run_together(false) : run.forward(); });
}

EXPORT(flowformer_causal_backward)(const FlowCall *call) {
  return dispatch<CausalPieces>(*call, [](auto &run) { run.wanted() ? run.run_together(true) : run.backward(); });
}

EXPORT(flowformer_bidirectional_forward)(const FlowCall *call) { return bidirectional(*call, false); }

EXPORT(flowformer_bidirectional_backward)(const FlowCall *call) { return bidirectional(*call, true); }

EXPORT(flowformer_step)(const StepCall *call, const void *q, const void *k, const void *v, void *out,
                        const float *log_decay, double *count, double *sums, double *log_normaliser, double *memory,
                        double *count_after, double *sums_after, double *log_normaliser_after, double *memory_after) {
  const State before{count, sums, log_normaliser, memory};
  const State after{count_after, sums_after, log_normaliser_after, memory_after};
  const auto run = [&](auto &&step) {
    step.run();
    return step.failed ? 1 : 0;
  };
  const auto with_decay = [&](auto decays) {
    if (call->half) return run(Step<bfloat16, decays>(*call, q, k, v, out, log_decay, before, after));
    return run(Step<float, decays>(*call, q, k, v, out, log_decay, before, after));
  };
  return log_decay ? with_decay(std::true_type()) : with_decay(std::false_type());
}

EXPORT(flowformer_attend_causal_forward)(const AttendCall *call) { return attend(*call, true, false); }
EXPORT(flowformer_attend_causal_backward)(const AttendCall *call) { return attend(*call, true, true); }
EXPORT(flowformer_attend_forward)(const AttendCall *call) { return attend(*call, false, false); }
EXPORT(flowformer_attend_backward)(const AttendCall *call) { return attend(*call, false, true); }

EXPORT(flowformer_attend_step)(const StepCall *call, const void *q, const void *k, const void *v, void *out,
                               const float *log_decay, const float *weight, const float *scale, double *sums,
                               double *memory, double *sums_after, double *memory_after) {
  const State before{nullptr, sums, nullptr, memory}, after{nullptr, sums_after, nullptr, memory_after};
  const auto run = [&](auto &&step) {
    step.run();
    return step.failed ? 1 : 0;
  };
  const auto with_decay = [&](auto decays) {
    if (call->half)
      return run(AttendStep<bfloat16, decays>(*call, q, k, v, out, log_decay, weight, scale, before, after));
    return run(AttendStep<float, decays>(*call, q, k, v, out, log_decay, weight, scale, before, after));
  };
  return log_decay ? with_decay(std::true_type()) : with_decay(std::false_type());
}

EXPORT(flowformer_aft_causal_forward)(const AftCall *call) { return run_aft<CausalMeans>(*call); }
EXPORT(flowformer_aft_causal_backward)(const AftCall *call) { return run_aft<CausalGradients>(*call); }
EXPORT(flowformer_aft_bidirectional_forward)(const AftCall *call) { return run_aft<OneMean>(*call); }
EXPORT(flowformer_aft_bidirectional_backward)(const AftCall *call) { return run_aft<OneMeanGradients>(*call); }
