// The bidirectional form with decay, backward. Every decayed sum has the same sum of derivatives as its derivative; the
// letters are those of bidirectional.h.
#pragma once

#include "bidirectional_decay.h"

namespace {

struct BidirectionalDecayBackward : BidirectionalDecay {
  const bool wanted;    // the gradient of log-decays
  float *gated_strips;  // g Q
  Vector crossing[CHUNK];

  BidirectionalDecayBackward(const FlowCall &call, Scratch &scratch, int64_t further = 0)
      : BidirectionalDecay(call, scratch, further), wanted(call.grad_log_decay.data) {
    gated_strips = scratch.take<float>(CHUNK * keys);
  }

  // d Q but for its gate, d K and d (w v) of the memory and of the growth: in the order of time of what lies before
  // each chunk, and of the chunk; against it of what lies ahead. The memory is (values, keys), the growth (keys,
  // values).
  void products(const Rows<const float> &log_decay, DecayedHead &head, Memory &memory, double *memory_sum,
                Memory &growth, double *growth_sum) {
    memory.across = true;
    memory.start_from_zero(memory_sum), growth.start_from_zero(growth_sum);
    for (int64_t at = 0; at < head.tokens; at += CHUNK) {
      if (wanted && at % Records::MARK == 0) keep(head, at, memory, growth);
      products_of_chunk(log_decay, head, at, true, memory, growth);
    }
    memory.start_from_zero(memory_sum), growth.start_from_zero(growth_sum);
    double later = 0;
    int64_t end = head.tokens;
    for (int64_t at = head.last_chunk(); at >= 0; at -= CHUNK) {
      products_of_chunk(log_decay, head, at, false, memory, growth);
      if (!wanted) continue;
      for (int t = head.in_chunk(at) - 1; t >= 0; t--) head.crossing[at + t] = (float)(later += head.crossing[at + t]);
      if (at % Records::MARK) continue;
      const double exact = crossing_at_mark(head, at, memory, growth);
      spread_drift(later - exact, at, end, head.crossing);
      later = exact, end = at;
    }
  }

  int64_t matrix() const { return call.key_channels * columns; }

  void keep(DecayedHead &head, int64_t at, Memory &memory, Memory &growth) const {
    memory.flush(), growth.flush();
    memcpy(head.memory_marks + Records::mark(at) * matrix(), memory.sum, sizeof(double) * matrix());
    memcpy(head.growth_marks + Records::mark(at) * matrix(), growth.sum, sizeof(double) * matrix());
  }

  // What crosses to a token at a mark, exactly: over many tokens, rounded differences would add up.
  double crossing_at_mark(const DecayedHead &head, int64_t token, Memory &memory, Memory &growth) const {
    memory.flush(), growth.flush();
    const double *before = head.memory_marks + Records::mark(token) * matrix();
    const double *growth_before = head.growth_marks + Records::mark(token) * matrix();
    double total = 0;
    for (int64_t i = 0; i < matrix(); i++) total += growth.sum[i] * before[i] + memory.sum[i] * growth_before[i];
    return total;
  }

  void products_of_chunk(const Rows<const float> &log_decay, DecayedHead &head, int64_t at, bool forward,
                         Memory &memory, Memory &growth) {
    const int tokens = head.in_chunk(at);
    const float *Q = head.Q + at * keys, *K = head.K + at * keys;
    decay.load(log_decay, at, tokens);
    const float *reached = forward ? decay.arriving : decay.leaving;
    const float *upstream = head.upstream + at * values;
    for (int t = 0; t < CHUNK; t++) {
      for (int x = 0; x < values; x += LANES)
        store(weighted + t * values + x, load(head.V + (at + t) * values + x) * head.weight[at + t]);
      gate[t] = t < tokens ? head.allocation[at + t] * head.inverse_in[at + t] : 0.f;
      for (int x = 0; x < keys; x += LANES) store(gated + t * keys + x, load(Q + t * keys + x) * gate[t]);
    }
    to_strips(upstream, CHUNK, values, upstream_strips);
    to_strips(K, CHUNK, keys, key_strips), to_strips(gated, CHUNK, keys, gated_strips);
    for (Vector &total : crossing) total = Vector{};
    if (forward) squares(K, upstream, tokens);
    each_strip(keys, [&](auto width, int column) {
      for (int i = 0; i < tokens; i += ROWS) {
        Tile<width> tile;
        tile.add(upstream + i * values, values, 1, memory.now + column * values, 0, values);
        tile.scale(reached + i);
        if (wanted) tile.meet(gated + i * keys + column, keys, crossing + i);
        if (forward) tile.add(agreement + i * CHUNK, CHUNK, 1, key_strips + column * CHUNK, 0, tokens);
        join(tile, forward, head.grad_Q + (at + i) * keys + column, keys);
      }
    });
    transpose_growth(growth);
    each_strip(keys, [&](auto width, int column) {
      for (int j = 0; j < tokens; j += ROWS) {
        Tile<width> tile;
        tile.add(weighted + j * values, values, 1, transposed + column * values, 0, values);
        tile.scale(reached + j);
        if (forward) tile.add(agreement + j, 1, CHUNK, gated_strips + column * CHUNK, 0, tokens);
        join(tile, forward, head.grad_K + (at + j) * keys + column, keys);
      }
    });
    each_strip(values, [&](auto width, int column) {
      for (int j = 0; j < tokens; j += ROWS) {
        Tile<width> tile;
        tile.add(K + j * keys, keys, 1, growth.now + column * keys, 0, keys);
        tile.scale(reached + j);
        if (wanted) tile.meet(weighted + j * values + column, values, crossing + j);
        if (forward) tile.add(capacity + j, 1, CHUNK, upstream_strips + column * CHUNK, 0, tokens);
        join(tile, forward, head.partial + (at + j) * values + column, values);
      }
    });
    if (wanted) keep_crossing(head, at, forward, tokens);
    const float *leaving = forward ? decay.leaving : decay.arriving;
    scale_rows(weighted, values, leaving), scale_rows(gated, keys, leaving);
    memory.add(weighted, key_strips, tokens, decay.whole);
    growth.add(gated, upstream_strips, tokens, decay.whole);
  }

  // g Q K^T and dR (w v)^T of the chunk, with decay; and what of their pairs begins and ends to cross at each token.
  void squares(const float *K, const float *upstream, int tokens) {
    fill_symmetric();
    by_channel(weighted, values, V_by_channel);
    square_product(upstream, V_by_channel, values, tokens, nullptr, agreement);
    by_channel(K, keys, K_by_channel);
    square_product(gated, K_by_channel, keys, tokens, symmetric, capacity);
    Vector of_sources[CHUNK / LANES];
    for (Vector &total : of_sources) total = Vector{};
    for (int i = 0; i < tokens; i++)
      for (int column = 0; column < CHUNK; column += LANES) {
        const int at = i * CHUNK + column;
        const Vector place = lane_numbers() + (float)column, pairs = load(capacity + at) * load(agreement + at);
        const Vector since = place<(float)i ? pairs : place>(float) i ? -pairs : Vector{};
        crossing[i] += since, of_sources[column / LANES] += since;
        store(agreement + at, load(agreement + at) * load(symmetric + at));
      }
    for (int t = 0; t < CHUNK; t++) crossing[t][0] -= of_sources[t / LANES][t % LANES];
  }

  void keep_crossing(DecayedHead &head, int64_t at, bool forward, int tokens) {
    for (int t = 0; t < tokens; t += LANES) {
      const Vector total = sums(crossing + t);
      store(head.crossing + at + t, forward ? total : load(head.crossing + at + t) - total);
    }
  }

  // d (allocation / I), d w and d v; d Q gets its gate.
  void finish_products(DecayedHead &head) const {
    for (int64_t t = 0; t < head.tokens; t++) {
      const float of_gate = head.allocation[t] * head.inverse_in[t];
      Vector of_output{}, of_weight{};
      for (int x = 0; x < keys; x += LANES) {
        const Vector P = load(head.grad_Q + t * keys + x);
        of_output += P * load(head.Q + t * keys + x);
        store(head.grad_Q + t * keys + x, P * of_gate);
      }
      for (int x = 0; x < values; x += LANES) {
        const Vector of_value = load(head.partial + t * values + x);
        of_weight += of_value * load(head.V + t * values + x);
        store(head.partial + t * values + x, of_value * head.weight[t]);
      }
      head.grad_gate[t] = sum(of_output), head.grad_flow[t] = sum(of_weight);
      head.grad_count[t] = call.competition == NONE ? 0.f : head.grad_flow[t] * head.weight[t] / head.n[t];
    }
  }

  // d w to d O^ for competition along the sequence. Sums of derivatives of normalisers are kept next to the one of
  // their token, since normalisers have no bound.
  void compete_backward(const Rows<const float> &log_decay, DecayedHead &head, double *past_of) const {
    double past = 0, ahead = 0;
    for (int64_t t = 0; t < head.tokens; t++) {
      if (t) past = (past - own(head, t - 1)) * step(log_decay, head, t, t - 1);
      past_of[t] = past;
    }
    for (int64_t t = head.tokens - 1; t >= 0; t--) {
      const double here = -own(head, t), Z = head.log_normaliser[t], share = std::exp(head.logit[t] - Z);
      const double since = ahead + here, seen = share + std::exp(head.log_ahead[t] - Z);
      if (wanted) head.crossing[t] += (float)(since * std::exp(head.log_past[t] - Z) + seen * past_of[t]);
      if (t) ahead = since * step(log_decay, head, t - 1, t);
      head.grad_flow[t] = (float)(own(head, t) + share * (since + past_of[t]));
    }
  }

  static double own(const DecayedHead &head, int64_t t) { return (double)head.grad_flow[t] * head.weight[t]; }

  // gamma between neighbours times exp(Z_to - Z_from): at most 1.
  static double step(const Rows<const float> &log_decay, const DecayedHead &head, int64_t to, int64_t from) {
    const double between = clip_log_decay(*log_decay.at(to > from ? to : from));
    return std::exp(between + head.log_normaliser[to] - head.log_normaliser[from]);
  }

  // d O^ and d I^ to d Q, d K and log-decays, through both pairs of sums.
  void sums_backward(const Rows<const float> &log_decay, DecayedHead &head) {
    for (int64_t t = 0; t < head.tokens; t++) {
      const float inverse = head.inverse_in[t], allocation = head.allocation[t];
      head.sink_factor[t] = call.allocation ? head.grad_gate[t] * inverse * allocation * (1.f - allocation) : 0.f;
      head.grad_flow[t] *= call.competition == NONE ? 0.f : head.inside[t];
      head.grad_in[t] = -head.grad_gate[t] * allocation * inverse * inverse, head.grad_out[t] = 0.f;
    }
    pair_backward(log_decay, head, head.scaled, head.sink_factor, head.grad_flow, true);
    pair_backward(log_decay, head, head.plain, head.grad_in, head.grad_out, false);
  }

  // Of (Q + e) . (sum of w K + e) and (K + e) . (sum of u Q + e), whose derivatives are given. Where w = 1 / O and u =
  // 1 / I, also d O and d I.
  void pair_backward(const Rows<const float> &log_decay, DecayedHead &head, const PairOfSums &pair,
                     const float *of_sinks, const float *of_sources, bool scaled) {
    gather_after(log_decay, head, of_sources, of_sinks, true, head.grad_after);
    clear_running();
    for (int64_t at = 0; at < head.tokens; at += CHUNK) {
      const int tokens = head.in_chunk(at);
      decay.load(log_decay, at, tokens);
      Vector of_decay[CHUNK], of_keys[CHUNK], of_queries[CHUNK];
      for (int t = 0; t < CHUNK; t++) of_decay[t] = of_keys[t] = of_queries[t] = Vector{};
      for (int x = 0; x < keys; x += LANES)
        pair_of_channels(head, pair, of_sinks, of_sources, at, x, tokens, of_decay, of_keys, of_queries);
      for (int t = 0; t < tokens; t += LANES) {
        if (wanted) store(head.crossing + at + t, load(head.crossing + at + t) + sums(of_decay + t));
        if (!scaled) continue;
        const Vector in = load(head.inverse_in + at + t), out = load(head.inverse_out + at + t);
        store(head.grad_in + at + t, load(head.grad_in + at + t) - in * in * sums(of_queries + t));
        store(head.grad_out + at + t, load(head.grad_out + at + t) - out * out * sums(of_keys + t));
      }
    }
  }

  inline __attribute__((always_inline)) void pair_of_channels(DecayedHead &head, const PairOfSums &pair,
                                                              const float *of_sinks, const float *of_sources,
                                                              int64_t at, int x, int tokens, Vector *of_decay,
                                                              Vector *of_keys, Vector *of_queries) {
    const Vector small = load(eps + x);
    TwoSided K, Q, of_K, of_Q;  // the sums, and what is wanted of sum Q (by K) and of sum K (by Q)
    for (int t = 0; t < tokens; t++) {
      const Vector K_t = load(head.K + (at + t) * keys + x), Q_t = load(head.Q + (at + t) * keys + x);
      K.own[t] = K_t * pair.key_weight[at + t], Q.own[t] = Q_t * pair.query_weight[at + t];
      of_K.own[t] = (K_t + small) * of_sources[at + t], of_Q.own[t] = (Q_t + small) * of_sinks[at + t];
    }
    const int64_t chunk = at / CHUNK * 2 * keys + x;
    Vector before = load(pair.before + chunk), after = load(pair.after + chunk);
    K.sum(decay, tokens, before, after);
    before = load(pair.before + chunk + keys), after = load(pair.after + chunk + keys);
    Q.sum(decay, tokens, before, after);
    before = rounded(running[0] + x), after = load(head.grad_after + chunk);
    of_K.sum(decay, tokens, before, after);
    carry(running[0] + x, before);
    before = rounded(running[1] + x), after = load(head.grad_after + chunk + keys);
    of_Q.sum(decay, tokens, before, after);
    carry(running[1] + x, before);
    for (int t = 0; t < tokens; t++) {
      const int64_t here = (at + t) * keys + x;
      const Vector X = of_Q.all(t), Y = of_K.all(t);
      if (wanted) of_decay[t] += K.crossing(of_Q, t) + Q.crossing(of_K, t);
      of_keys[t] += load(head.K + here) * X, of_queries[t] += load(head.Q + here) * Y;
      store(head.grad_K + here,
            load(head.grad_K + here) + X * pair.key_weight[at + t] + (Q.all(t) + small) * of_sources[at + t]);
      store(head.grad_Q + here,
            load(head.grad_Q + here) + Y * pair.query_weight[at + t] + (K.all(t) + small) * of_sinks[at + t]);
    }
  }

  // Through the feature map, and out.
  template <class T>
  void write_inputs(int64_t sequence, int64_t h, const DecayedHead &head) const {
    const auto q = rows_of<const T>(call.q, call.sinks, sequence, h),
               k = rows_of<const T>(call.k, call.sinks, sequence, h);
    const auto grad_q = rows_of<float>(call.grad_q, call.sinks, sequence, h);
    const auto grad_k = rows_of<float>(call.grad_k, call.sinks, sequence, h);
    const auto grad_v = rows_of<T>(call.grad_v, call.sinks, sequence, h);
    for (int64_t t = 0; t < head.tokens; t++) {
      for (int x = 0; x < keys; x += LANES) {
        const Vector Q_slope = slope_of(q.at(t), x, load(head.Q + t * keys + x));
        const Vector K_slope = slope_of(k.at(t), x, load(head.K + t * keys + x));
        store_part(grad_q.at(t), call.key_channels, x, load(head.grad_Q + t * keys + x) * Q_slope);
        store_part(grad_k.at(t), call.key_channels, x, load(head.grad_K + t * keys + x) * K_slope);
      }
      for (int x = 0; x < values; x += LANES)
        store_part(grad_v.at(t), call.value_channels, x, load(head.partial + t * values + x));
    }
  }

  template <class T>
  Vector slope_of(const T *row, int at, Vector features) const {
    return feature_slope(load_part(row, call.key_channels, at), features, call.feature_map);
  }

  // With what the counts add.
  void write_decay(const Rows<const float> &log_decay, const Rows<float> &out, const DecayedHead &head) const {
    double past = 0, ahead = 0;
    for (int64_t t = 0; t < head.tokens; t++) {
      past = t ? (past + head.grad_count[t - 1]) * decay_of(*log_decay.at(t)) : 0.;
      head.crossing[t] += (float)(past * (head.n[t] - head.past_count[t]));
    }
    for (int64_t t = head.tokens - 1; t >= 0; t--) {
      const float given = *log_decay.at(t);
      ahead += head.grad_count[t];
      *out.at(t) = given > 0 ? 0.f : head.crossing[t] + (float)(ahead * head.past_count[t]);
      ahead *= decay_of(given);
    }
  }
};

}  // namespace
