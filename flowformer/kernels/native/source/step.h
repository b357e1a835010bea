// One token of the causal form, in the doubles that states consist of. The state after it is written beside the one
// before.
#pragma once

#include "call.h"
#include "flows.h"
#include "runs.h"

namespace {

template <class T, bool DECAYS>
struct Step {
  const StepCall &call;
  const T *q, *k, *v;
  T *out;
  const float *log_decay;  // or null
  State before, after;
  const int keys;  // padded
  std::atomic<bool> failed{false};

  Step(const StepCall &call, const void *q, const void *k, const void *v, void *out, const float *log_decay,
       const State &before, const State &after)
      : call(call),
        q(static_cast<const T *>(q)),
        k(static_cast<const T *>(k)),
        v(static_cast<const T *>(v)),
        out(static_cast<T *>(out)),
        log_decay(log_decay),
        before(before),
        after(after),
        keys(padded(call.key_channels)) {}

  // One head's features and flows.
  struct Head {
    double *Q, *K;  // zero at padding
    double n;
    double log_kept, kept;  // of the past
    double gate, conserved;
  };

  void run() {
    const bool large = call.batch * call.heads * call.key_channels * call.value_channels > (1 << 19);
    run_tasks(
        call.batch, large ? call.threads : 1,
        [](void *context, int64_t row, int) {
          Step &step = *static_cast<Step *>(context);
          if (!with_scratch([&](Scratch &scratch, bool real) { step.row(row, scratch, real); })) step.failed = true;
        },
        this);
  }

  void row(int64_t b, Scratch &scratch, bool real) {
    Head *heads = scratch.take<Head>(call.heads);
    float *conserved = scratch.take<float>(call.heads);
    double *weighted = scratch.take<double>(call.value_channels + LANES);
    double *features = scratch.take<double>(call.heads * 2 * keys);
    if (!real) return;
    for (int64_t h = 0; h < call.heads; h++) {
      decay(b * call.heads + h, log_decay ? log_decay[call.decay_of_rows ? b * call.heads + h : h] : 0.f, heads[h]);
      heads[h].Q = features + h * 2 * keys, heads[h].K = heads[h].Q + keys;
      flows(b * call.heads + h, heads[h]);
      conserved[h] = (float)heads[h].conserved;
    }
    if (call.competition == HEADS)
      softmax_over_heads(
          call.heads, [&](int64_t h) { return heads[h].n; }, [&](int64_t h) -> float & { return conserved[h]; });
    for (int64_t h = 0; h < call.heads; h++) {
      const int64_t index = b * call.heads + h;
      const double past = before.log_normaliser[index];
      double weight = call.competition == HEADS ? conserved[h] : 1.;
      after.log_normaliser[index] = past;
      if (call.competition == SEQUENCE) {
        const double flow = heads[h].conserved, kept = past + heads[h].log_kept, larger = flow > kept ? flow : kept;
        const double present = larger + std::log(std::exp(flow - larger) + std::exp(kept - larger));
        after.log_normaliser[index] = present;
        weight = heads[h].n * std::exp(flow - present);
      }
      remember(index, heads[h], weight, weighted);
    }
  }

  // Without decay the past is not multiplied by 1, since that would round the product that is added to it.
  void decay(int64_t index, float given, Head &head) const {
    head.kept = decay_of(given), head.log_kept = given < 0 ? given : 0.;
    head.n = after.count[index] = before.count[index] * head.kept + 1.;
  }

  void features(const T *input, double *out) const {
    for (int x = 0; x < keys; x += LANES) {
      const Vector phi = feature(load_part(input, call.key_channels, x), call.feature_map);
      for (int i = 0; i < LANES; i++) out[x + i] = x + i < call.key_channels ? phi[i] : 0.;
    }
  }

  // sum_x (a_x + eps)(b_x + eps) over the channels there are
  double flow(const double *a, const double *b) const {
    const int channels = (int)call.key_channels;
    Doubles total = Doubles{};
    int x = 0;
    for (; x + HALF_LANES <= channels; x += HALF_LANES)
      total += (load_doubles(a + x) + call.eps) * (load_doubles(b + x) + call.eps);
    double sum = sum_doubles(total);
    for (; x < channels; x++) sum += (a[x] + call.eps) * (b[x] + call.eps);
    return sum + call.flow_eps;
  }

  // after = kept * before + factor * added; one of the four sums
  void grow(int64_t index, int which, double kept, const double *added, double factor) const {
    const int64_t at = (index * 4 + which) * call.key_channels;
    for (int x = 0; x < call.key_channels; x++)
      after.sums[at + x] = (DECAYS ? before.sums[at + x] * kept : before.sums[at + x]) + factor * added[x];
  }

  void flows(int64_t index, Head &head) const {
    const double n = head.n, kept = head.kept;
    features(q + index * call.key_channels, head.Q);
    features(k + index * call.key_channels, head.K);
    const double *sums = after.sums + index * 4 * call.key_channels;
    grow(index, 0, kept, head.K, 1.), grow(index, 1, kept, head.Q, 1.);
    const double incoming = flow(head.Q, sums), outgoing = flow(head.K, sums + call.key_channels);
    grow(index, 2, kept, head.K, n / outgoing), grow(index, 3, kept, head.Q, n / incoming);
    const double conserved = (flow(head.Q, sums + 2 * call.key_channels) - call.flow_eps) / n + call.flow_eps;
    head.gate = (call.allocation ? 1. / (1. + std::exp(-conserved)) : 1.) / incoming;
    head.conserved = (flow(head.K, sums + 3 * call.key_channels) - call.flow_eps) / n + call.flow_eps;
    if (call.clamp < 0) return;
    head.conserved = head.conserved > call.clamp    ? call.clamp
                     : head.conserved < -call.clamp ? -call.clamp
                                                    : head.conserved;
  }

  // The memory takes the value in, and gives the output.
  void remember(int64_t index, const Head &head, double weight, double *weighted) const {
    const int channels = (int)call.value_channels;
    const T *value = v + index * channels;
    T *result = out + index * channels;
    const double *past = before.memory + index * call.key_channels * channels;
    double *present = after.memory + index * call.key_channels * channels;
    for (int x = 0; x < channels; x++) weighted[x] = weight * to_float(value[x]);
    int x = 0;
    for (; x + 4 * HALF_LANES <= channels; x += 4 * HALF_LANES)
      remember_columns<4>(head, weighted, x, channels, past, present, result);
    for (; x + HALF_LANES <= channels; x += HALF_LANES)
      remember_columns<1>(head, weighted, x, channels, past, present, result);
    for (; x < channels; x++) {
      double total = 0;
      for (int d = 0; d < call.key_channels; d++) {
        const double kept = DECAYS ? past[d * channels + x] * head.kept : past[d * channels + x];
        const double now = kept + head.K[d] * weighted[x];
        present[d * channels + x] = now;
        total += head.Q[d] * now;
      }
      from_float(result + x, (float)(total * head.gate));
    }
  }

  template <int M>
  inline __attribute__((always_inline)) void remember_columns(const Head &head, const double *weighted, int x,
                                                              int channels, const double *past, double *present,
                                                              T *result) const {
    Doubles value[M], total[M];
    for (int m = 0; m < M; m++) value[m] = load_doubles(weighted + x + m * HALF_LANES), total[m] = Doubles{};
    for (int d = 0; d < call.key_channels; d++)
      for (int m = 0; m < M; m++) {
        const int at = d * channels + x + m * HALF_LANES;
        const Doubles kept = DECAYS ? load_doubles(past + at) * head.kept : load_doubles(past + at);
        const Doubles now = kept + value[m] * head.K[d];
        store_doubles(present + at, now);
        total[m] += now * head.Q[d];
      }
    for (int m = 0; m < M; m++)
      for (int i = 0; i < HALF_LANES; i++)
        from_float(result + x + m * HALF_LANES + i, (float)(total[m][i] * head.gate));
  }
};

}  // namespace
