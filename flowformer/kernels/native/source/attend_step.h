// One token of causal linear attention of features, in the doubles that states consist of.
#pragma once

#include "step.h"

namespace {

template <class T, bool DECAYS>
struct AttendStep : Step<T, DECAYS> {
  using Base = Step<T, DECAYS>;
  using Base::after, Base::before, Base::call, Base::keys;
  const float *log_decay, *weight, *scale;  // or null; the latter two (batch, heads)
  const bool divides;

  AttendStep(const StepCall &call, const void *q, const void *k, const void *v, void *out, const float *log_decay,
             const float *weight, const float *scale, const State &before, const State &after)
      : Base(call, q, k, v, out, log_decay, before, after),
        log_decay(log_decay),
        weight(weight),
        scale(scale),
        divides(before.sums) {}

  void run() {
    const bool large = call.batch * call.heads * call.key_channels * call.value_channels > (1 << 19);
    run_tasks(
        call.batch, large ? call.threads : 1,
        [](void *context, int64_t row, int) {
          AttendStep &step = *static_cast<AttendStep *>(context);
          if (!with_scratch([&](Scratch &scratch, bool real) { step.row(row, scratch, real); })) step.failed = true;
        },
        this);
  }

  void row(int64_t b, Scratch &scratch, bool real) {
    typename Base::Head head;
    double *weighted = scratch.take<double>(call.value_channels + LANES);
    head.Q = scratch.take<double>(keys), head.K = scratch.take<double>(keys);
    if (!real) return;
    for (int64_t index = b * call.heads; index < (b + 1) * call.heads; index++) {
      head.kept = DECAYS ? decay_of(log_decay[call.decay_of_rows ? index : index % call.heads]) : 1.;
      this->features(this->q + index * call.key_channels, head.Q);
      this->features(this->k + index * call.key_channels, head.K);
      for (int x = 0; weight && x < keys; x++) head.K[x] *= weight[index];
      head.gate = (scale ? scale[index] : 1.) / (divides ? total(index, head) + call.eps : 1.);
      this->remember(index, head, 1., weighted);
    }
  }

  // T; the sum of keys takes the token in.
  double total(int64_t index, const typename Base::Head &head) const {
    double found = 0.;
    for (int64_t x = 0; x < call.key_channels; x++) {
      const int64_t at = index * call.key_channels + x;
      after.sums[at] = (DECAYS ? before.sums[at] * head.kept : before.sums[at]) + head.K[x];
      found += head.Q[x] * after.sums[at];
    }
    return found;
  }
};

}  // namespace
