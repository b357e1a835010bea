// Who computes what of the bidirectional form: a task for each bundle of heads; or, where heads compete or threads
// outnumber heads, a task for each piece of a head in each pass.
#pragma once

#include "bidirectional.h"
#include "runs.h"

namespace {

template <class T, int>
struct BidirectionalRun {
  const FlowCall &call;
  const int keys, values;
  const int64_t matrix;
  std::atomic<bool> failed{false};
  bool backward = false;

  explicit BidirectionalRun(const FlowCall &call)
      : call(call),
        keys(padded(call.key_channels)),
        values(padded(call.value_channels)),
        matrix(call.key_channels * call.value_channels) {}

  int64_t heads() const { return call.sequences * call.heads; }
  int64_t sinks(int64_t sequence) const { return call.sinks.rows[3 * sequence + 2]; }
  int64_t sources(int64_t sequence) const { return call.sources.rows[3 * sequence + 2]; }
  bool empty(int64_t sequence) const { return !sinks(sequence) || !sources(sequence); }

  void run(bool gradients) {
    backward = gradients;
    const int64_t pieces = pieces_of_heads(call, longest());
    if (pieces > 1 || call.competition == HEADS) {
      if (!with_scratch([&](Scratch &scratch, bool real) { run_together(pieces, scratch, real); })) failed = true;
      return;
    }
    run_tasks(
        call.sequences * bundles(call), call.threads,
        [](void *context, int64_t task, int) {
          BidirectionalRun &run = *static_cast<BidirectionalRun *>(context);
          if (!with_scratch([&](Scratch &scratch, bool real) { run.run_bundle(task, scratch, real); }))
            run.failed = true;
        },
        this);
  }

  int64_t longest() const {
    int64_t most = 0;
    for (int64_t s = 0; s < call.sequences; s++) {
      most = sinks(s) > most ? sinks(s) : most;
      most = sources(s) > most ? sources(s) : most;
    }
    return most;
  }

  template <class Body>
  void each_pass(Body body) const {
    body(SUMS), body(SCALED);
    if (call.competition == HEADS) body(CONSERVED);
    body(AGGREGATE);
    if (!backward) return body(SINKS);
    body(GRAD_SINKS), body(GRAD_VALUES), body(GRAD_SOURCES), body(GRAD_Q), body(GRAD_K);
  }

  // All passes over some heads of a sequence, which go through the tokens together.
  void run_bundle(int64_t task, Scratch &scratch, bool real) {
    const Bundle bundle = bundle_of(call, task);
    const int64_t s = bundle.sequence, first = s * call.heads + bundle.head;
    Bidirectional<T> worker(call, scratch);
    Part *parts = scratch.take<Part>(bundle.count);
    Totals *totals = scratch.take<Totals>(bundle.count);
    for (int64_t h = 0; h < bundle.count; h++) {
      const Part part(call, keys, values, scratch);
      const Totals total(call, keys, values, sinks(s), sources(s), backward, scratch);
      if (real) new (parts + h) Part(part), new (totals + h) Totals(total);
    }
    if (!real) return;
    worker.prepare();
    for (int64_t h = 0; empty(s) && h < bundle.count; h++) zero(first + h);
    if (empty(s)) return;
    each_pass([&](Pass pass) {
      for (int64_t h = 0; h < bundle.count; h++) parts[h].clear(keys);
      for (int64_t at = 0; at < sinks(s) || at < sources(s); at += TOGETHER)
        for (int64_t h = 0; h < bundle.count; h++) {
          const Range range{least(at, sinks(s)), least(at + TOGETHER, sinks(s)), least(at, sources(s)),
                            least(at + TOGETHER, sources(s))};
          one_pass(pass, first + h, range, worker, totals[h], parts[h]);
        }
      for (int64_t h = 0; h < bundle.count; h++) merge(pass, s, totals[h], parts + h, 1);
    });
  }

  static constexpr int64_t TOGETHER = 256;  // tokens of one head before the next head's turn
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  // One pass over one piece.
  void one_pass(Pass pass, int64_t index, const Range &range, Bidirectional<T> &worker, Totals &totals, Part &part) {
    const int64_t s = index / call.heads, h = index % call.heads;
    const auto q = rows_of<const T>(call.q, call.sinks, s, h);
    const auto k = rows_of<const T>(call.k, call.sources, s, h), v = rows_of<const T>(call.v, call.sources, s, h);
    const auto grad_q = rows_of<float>(call.grad_q, call.sinks, s, h);
    const auto grad_k = rows_of<float>(call.grad_k, call.sources, s, h);
    const float share = (float)sinks(s) / (float)sources(s), rescale = call.rescale ? 1.f / share : 1.f;
    switch (pass) {
      case SUMS:
        worker.sum_features(q, totals.Q, range.sinks_first, range.sinks_last, part.sums[SUM_Q]);
        worker.sum_features(k, totals.K, range.sources_first, range.sources_last, part.sums[SUM_K]);
        break;
      case SCALED:
        worker.scale_features(q, totals.Q, range.sinks_first, range.sinks_last, totals.with_eps[SUM_K],
                              totals.inverse_in, part.sums[SUM_Q_SCALED]);
        worker.scale_features(k, totals.K, range.sources_first, range.sources_last, totals.with_eps[SUM_Q],
                              totals.inverse_out, part.sums[SUM_K_SCALED]);
        break;
      case CONSERVED:
        worker.each_chunk(range.sources_first, range.sources_last, [&](int64_t at, int tokens) {
          worker.conserve(k, at, tokens, range.sources_last, totals, rescale, backward);
        });
        break;
      case AGGREGATE:
        worker.aggregate(k, v, range, totals, part, rescale, backward);
        break;
      case SINKS:
        worker.put_out(q, rows_of<T>(call.out, call.sinks, s, h), range, totals, share);
        break;
      case GRAD_SINKS:
        worker.grad_sinks(q, rows_of<const T>(call.grad_out, call.sinks, s, h), grad_q, range, totals, part, share);
        break;
      case GRAD_VALUES:
        worker.grad_values(k, v, rows_of<T>(call.grad_v, call.sources, s, h), grad_k, range, totals);
        break;
      case GRAD_SOURCES:
        worker.grad_sources(k, grad_k, range, totals, part, rescale);
        break;
      case GRAD_Q:
        worker.finish_sinks(q, grad_q, range, totals, part);
        break;
      case GRAD_K:
        worker.finish_sources(k, grad_k, range, totals);
        break;
    }
  }

  // Add up what the pieces of a head gathered, and lay it ready for the next pass.
  void merge(Pass pass, int64_t sequence, Totals &totals, Part *parts, int64_t pieces) const {
    if (pass == SUMS) merge_sums(totals, parts, pieces, SUM_K, SUM_Q, true);
    if (pass == SCALED) merge_sums(totals, parts, pieces, SUM_K_SCALED, SUM_Q_SCALED, true);
    if (pass == GRAD_SOURCES) merge_sums(totals, parts, pieces, SUM_Y, SUM_W, false);
    if (pass == GRAD_Q) merge_sums(totals, parts, pieces, SUM_Z, SUM_Z, false);
    for (int64_t p = 0; p < pieces; p++)
      if (pass == AGGREGATE || pass == GRAD_SINKS) parts[p].memory.flush();
    if (pass == AGGREGATE) merge_aggregate(sequence, totals, parts, pieces);
    if (pass != GRAD_SINKS) return;
    merge_sums(totals, parts, pieces, SUM_X, SUM_X, false);
    memset(totals.growth, 0, sizeof(double) * matrix);
    for (int64_t p = 0; p < pieces; p++)
      for (int64_t i = 0; i < matrix; i++) totals.growth[i] += parts[p].matrix[i];
    lay_out(totals.growth, totals.G, totals.G_across);
    totals.agreement = 0;
    for (int64_t i = 0; i < matrix; i++) totals.agreement += totals.growth[i] * totals.aggregate[i];
    totals.agreement /= (double)sources(sequence);
  }

  void merge_sums(Totals &totals, Part *parts, int64_t pieces, Sum first, Sum second, bool with_eps) const {
    for (Sum which : {first, second})
      for (int x = 0; x < keys; x++) {
        double sum = 0;
        for (int64_t p = 0; p < pieces; p++) sum += parts[p].sums[which][x];
        totals.sums[which][x] = sum;
        totals.with_eps[which][x] = (float)sum + (with_eps && x < call.key_channels ? (float)call.eps : 0.f);
      }
  }

  // M; and for competition along the sequence the weights, of what is O^ till then.
  void merge_aggregate(int64_t sequence, Totals &totals, Part *parts, int64_t pieces) const {
    totals.largest = LOG_ZERO, totals.total = 0;
    for (int64_t p = 0; p < pieces; p++)
      totals.largest = parts[p].largest > totals.largest ? parts[p].largest : totals.largest;
    memset(totals.aggregate, 0, sizeof(double) * matrix);
    const bool along = call.competition == SEQUENCE;
    for (int64_t p = 0; p < pieces; p++) {
      const double kept = along ? std::exp(parts[p].largest - totals.largest) : 1.;
      totals.total += parts[p].total * kept;
      for (int64_t i = 0; i < matrix; i++) totals.aggregate[i] += parts[p].matrix[i] * kept;
    }
    if (along) {
      const double scale = (double)sources(sequence) / totals.total;
      for (int64_t i = 0; i < matrix; i++) totals.aggregate[i] *= scale;
      if (backward)
        for (int64_t t = 0; t < sources(sequence); t += LANES)
          store(totals.weight + t, exp(load(totals.weight + t) - (float)totals.largest) * (float)scale);
    }
    lay_out(totals.aggregate, totals.M, totals.M_across);
  }

  // A matrix of doubles as floats in strips, and its transpose.
  void lay_out(const double *from, float *strips, float *across) const {
    memset(strips, 0, sizeof(float) * keys * values);
    memset(across, 0, sizeof(float) * keys * values);
    each_strip(values, [&](auto width, int column) {
      for (int d = 0; d < call.key_channels; d++)
        for (int x = 0; x < width * LANES && column + x < call.value_channels; x++)
          strips[column * keys + d * width * LANES + x] = (float)from[d * call.value_channels + column + x];
    });
    each_strip(keys, [&](auto width, int column) {
      for (int x = 0; x < call.value_channels; x++)
        for (int d = 0; d < width * LANES && column + d < call.key_channels; d++)
          across[column * values + x * width * LANES + d] = (float)from[(column + d) * call.value_channels + x];
    });
  }

  // Without a sink or a source nothing flows.
  void zero(int64_t index) const {
    const int64_t s = index / call.heads, h = index % call.heads;
    if (!backward) return zero_rows(rows_of<T>(call.out, call.sinks, s, h), sinks(s), call.value_channels);
    zero_rows(rows_of<float>(call.grad_q, call.sinks, s, h), sinks(s), call.key_channels);
    zero_rows(rows_of<float>(call.grad_k, call.sources, s, h), sources(s), call.key_channels);
    zero_rows(rows_of<T>(call.grad_v, call.sources, s, h), sources(s), call.value_channels);
  }

  template <class E>
  static void zero_rows(const Rows<E> &rows, int64_t count, int64_t channels) {
    for (int64_t t = 0; t < count; t++) memset(static_cast<void *>(rows.at(t)), 0, sizeof(E) * channels);
  }

  // --------------------------------------------------------------------------------------------------- passes together

  struct Together {
    BidirectionalRun *run;
    int64_t pieces;
    Pass pass;
    Totals *totals;  // of every head
    Part *parts;     // of every piece of every head
  };

  void run_together(int64_t pieces, Scratch &scratch, bool real) {
    Together all{this, pieces, SUMS, scratch.take<Totals>(heads()), scratch.take<Part>(heads() * pieces)};
    for (int64_t index = 0; index < heads(); index++) {
      const int64_t s = index / call.heads;
      const Totals made(call, keys, values, sinks(s), sources(s), backward, scratch);
      if (real) new (all.totals + index) Totals(made);
      for (int64_t p = 0; p < pieces; p++) {
        const Part part(call, keys, values, scratch);
        if (real) new (all.parts + index * pieces + p) Part(part);
      }
    }
    if (!real) return;
    each_pass([&](Pass pass) {
      all.pass = pass;
      run_tasks(heads() * pieces, call.threads, piece_task, &all);
      run_tasks(heads(), call.threads, merge_task, &all);
      if (call.competition == HEADS && (pass == CONSERVED || pass == GRAD_VALUES))
        for (int64_t s = 0; s < call.sequences; s++) compete_over_heads(s, all);
    });
  }

  static void piece_task(void *context, int64_t task, int) {
    const Together &all = *static_cast<Together *>(context);
    if (!with_scratch([&](Scratch &scratch, bool real) { all.run->piece(task, all, scratch, real); }))
      all.run->failed = true;
  }

  void piece(int64_t task, const Together &all, Scratch &scratch, bool real) {
    Bidirectional<T> worker(call, scratch);
    if (!real) return;
    const int64_t index = task / all.pieces, piece = task % all.pieces, s = index / call.heads;
    if (empty(s)) {
      if (piece == 0) zero(index);
      return;
    }
    worker.prepare();
    all.parts[task].clear(keys);
    const Range range{piece_start(sinks(s), piece, all.pieces), piece_start(sinks(s), piece + 1, all.pieces),
                      piece_start(sources(s), piece, all.pieces), piece_start(sources(s), piece + 1, all.pieces)};
    one_pass(all.pass, index, range, worker, all.totals[index], all.parts[task]);
  }

  static void merge_task(void *context, int64_t index, int) {
    const Together &all = *static_cast<Together *>(context);
    const int64_t s = index / all.run->call.heads;
    if (!all.run->empty(s)) all.run->merge(all.pass, s, all.totals[index], all.parts + index * all.pieces, all.pieces);
  }

  // O^ to weights, S times a softmax over the heads; or d w to d O^.
  void compete_over_heads(int64_t sequence, const Together &all) const {
    const Totals *of = all.totals + sequence * call.heads;
    if (empty(sequence)) return;
    const auto count = [&](int64_t) { return (double)sources(sequence); };
    for (int64_t t = 0; t < sources(sequence); t++) {
      const auto weight = [&](int64_t h) -> float & { return of[h].weight[t]; };
      const auto grad = [&](int64_t h) -> float & { return of[h].grad_flow[t]; };
      if (all.pass == CONSERVED)
        softmax_over_heads(call.heads, count, weight);
      else
        softmax_gradient(call.heads, count, weight, grad);
    }
  }
};

}  // namespace
