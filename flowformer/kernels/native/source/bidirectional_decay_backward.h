// The bidirectional form with decay, backward. Every decayed sum has the same sum of derivatives as its derivative; the
// letters are those of bidirectional.h.
#pragma once

#include "bidirectional_decay.h"

namespace {

template <class T>
struct BidirectionalDecayBackward : BidirectionalDecay<T> {
  using Base = BidirectionalDecay<T>;
  using Base::call, Base::keys, Base::values, Base::K_by_channel, Base::capacity, Base::gate, Base::decay;
  using Base::key_strips, Base::transposed, Base::grad_Q, Base::grad_K, Base::running, Base::symmetric;
  using Base::upstream, Base::upstream_strips, Base::weighted, Base::V_by_channel, Base::agreement, Base::gated;
  using typename Base::Tensors;
  const bool wanted;    // the gradient of log-decays
  float *gated_strips;  // g Q
  Vector crossing[CHUNK];

  BidirectionalDecayBackward(const FlowCall &call, Scratch &scratch)
      : Base(call, scratch), wanted(call.grad_log_decay.data) {
    gated_strips = scratch.take<float>(CHUNK * keys);
  }

  // d Q but for its gate, d K and d (w v) of the memory and of the growth: in the order of time of what lies before
  // each chunk, and of the chunk; against it of what lies ahead. The memory is (values, keys), the growth (keys,
  // values).
  void products(const Tensors &to, DecayedHead &head, Memory &memory, double *memory_sum, Memory &growth,
                double *growth_sum) {
    memory.across = true;
    memory.start_from_zero(memory_sum), growth.start_from_zero(growth_sum);
    for (int64_t at = 0; at < head.tokens; at += CHUNK) {
      if (wanted && at % Records::MARK == 0) keep(head, at, memory, growth);
      products_of_chunk<true>(to, head, at, memory, growth);
    }
    memory.start_from_zero(memory_sum), growth.start_from_zero(growth_sum);
    double later = 0;
    for (int64_t at = head.last_chunk(); at >= 0; at -= CHUNK) {
      const int tokens = head.in_chunk(at);
      if (wanted && (at + tokens) % Records::MARK == 0 && at + tokens < head.tokens)
        later = crossing_at_mark(head, at + tokens, memory, growth);
      products_of_chunk<false>(to, head, at, memory, growth);
      for (int t = tokens - 1; wanted && t >= 0; t--) head.crossing[at + t] = (float)(later += head.crossing[at + t]);
    }
  }

  int64_t matrix() const { return call.key_channels * call.value_channels; }

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

  template <bool FORWARD>
  void products_of_chunk(const Tensors &to, DecayedHead &head, int64_t at, Memory &memory, Memory &growth) {
    const int tokens = head.in_chunk(at);
    const float *Q = head.Q + at * keys, *K = head.K + at * keys;
    decay.load(to.log_decay, at, tokens);
    const float *reached = FORWARD ? decay.arriving : decay.leaving;
    this->load_rows(to.v, at, tokens, head.weight + at, weighted);
    this->load_rows(to.grad_out, at, tokens, nullptr, upstream);
    for (int t = 0; t < CHUNK; t++) {
      gate[t] = t < tokens ? head.allocation[at + t] * head.inverse_in[at + t] : 0.f;
      for (int x = 0; x < keys; x += LANES) store(gated + t * keys + x, load(Q + t * keys + x) * gate[t]);
    }
    to_strips(upstream, CHUNK, values, upstream_strips);
    to_strips(K, CHUNK, keys, key_strips), to_strips(gated, CHUNK, keys, gated_strips);
    for (Vector &total : crossing) total = Vector{};
    if (FORWARD) squares(K, tokens);
    each_strip(keys, [&](auto width, int column) {
      for (int i = 0; i < tokens; i += ROWS) {
        Tile<width> tile;
        tile.add(upstream + i * values, values, 1, memory.now + column * values, 0, values);
        tile.scale(reached + i);
        if (wanted) tile.meet(gated + i * keys + column, keys, crossing + i);
        if (FORWARD) tile.add(agreement + i * CHUNK, CHUNK, 1, key_strips + column * CHUNK, 0, tokens);
        join<FORWARD>(tile, head.grad_Q + (at + i) * keys + column, keys);
      }
    });
    this->transpose_growth(growth);
    each_strip(keys, [&](auto width, int column) {
      for (int j = 0; j < tokens; j += ROWS) {
        Tile<width> tile;
        tile.add(weighted + j * values, values, 1, transposed + column * values, 0, values);
        tile.scale(reached + j);
        if (FORWARD) tile.add(agreement + j, 1, CHUNK, gated_strips + column * CHUNK, 0, tokens);
        join<FORWARD>(tile, head.grad_K + (at + j) * keys + column, keys);
      }
    });
    each_strip(values, [&](auto width, int column) {
      for (int j = 0; j < tokens; j += ROWS) {
        Tile<width> tile;
        tile.add(K + j * keys, keys, 1, growth.now + column * keys, 0, keys);
        tile.scale(reached + j);
        if (wanted) tile.meet(weighted + j * values + column, values, crossing + j);
        if (FORWARD) tile.add(capacity + j, 1, CHUNK, upstream_strips + column * CHUNK, 0, tokens);
        join<FORWARD>(tile, head.partial + (at + j) * values + column, values);
      }
    });
    if (wanted) keep_crossing<FORWARD>(head, at, tokens);
    const float *leaving = FORWARD ? decay.leaving : decay.arriving;
    this->scale_rows(weighted, values, leaving), this->scale_rows(gated, keys, leaving);
    memory.add(weighted, key_strips, tokens, decay.whole);
    growth.add(gated, upstream_strips, tokens, decay.whole);
  }

  template <bool FIRST, int M>
  static void join(const Tile<M> &tile, float *out, int stride) {
    for (int r = 0; r < ROWS; r++)
      for (int m = 0; m < M; m++) {
        float *place = out + r * stride + m * LANES;
        store(place, FIRST ? tile.sum[r][m] : load(place) + tile.sum[r][m]);
      }
  }

  // g Q K^T and dR (w v)^T of the chunk, with decay; and what of their pairs begins and ends to cross at each token.
  void squares(const float *K, int tokens) {
    this->fill_symmetric();
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

  template <bool FORWARD>
  void keep_crossing(DecayedHead &head, int64_t at, int tokens) {
    for (int t = 0; t < tokens; t += LANES) {
      const Vector total = sums(crossing + t);
      store(head.crossing + at + t, FORWARD ? total : load(head.crossing + at + t) - total);
    }
  }

  // d (allocation / I), d w and d v; d Q gets its gate.
  void finish_products(const Tensors &to, DecayedHead &head) {
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
        of_weight += of_value * load_part(to.v.at(t), call.value_channels, x);
        store_part(to.grad_v.at(t), call.value_channels, x, of_value * head.weight[t]);
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
    const double between = BidirectionalDecay<T>::log_of(*log_decay.at(to > from ? to : from));
    return std::exp(between + head.log_normaliser[to] - head.log_normaliser[from]);
  }

  // d O^ and d I^ to d Q, d K and log-decays, through both pairs of sums.
  void sums_backward(const Tensors &to, DecayedHead &head) {
    for (int64_t t = 0; t < head.tokens; t++) {
      const float inverse = head.inverse_in[t], allocation = head.allocation[t];
      head.sink_factor[t] = call.allocation ? head.grad_gate[t] * inverse * allocation * (1.f - allocation) : 0.f;
      head.grad_flow[t] *= call.competition == NONE ? 0.f : head.inside[t];
      head.grad_in[t] = -head.grad_gate[t] * allocation * inverse * inverse, head.grad_out[t] = 0.f;
    }
    pair_backward(to, head, head.scaled, head.sink_factor, head.grad_flow, true);
    pair_backward(to, head, head.plain, head.grad_in, head.grad_out, false);
  }

  // Of (Q + e) . (sum of w K + e) and (K + e) . (sum of u Q + e), whose derivatives are given. Where w = 1 / O and u =
  // 1 / I, also d O and d I.
  void pair_backward(const Tensors &to, DecayedHead &head, const PairOfSums &pair, const float *of_sinks,
                     const float *of_sources, bool scaled) {
    this->gather_after(to, head, of_sources, of_sinks, true, head.grad_after);
    this->clear_running();
    for (int64_t at = 0; at < head.tokens; at += CHUNK) {
      const int tokens = head.in_chunk(at);
      decay.load(to.log_decay, at, tokens);
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
    const Vector small = load(this->eps + x);
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
    before = this->rounded(running[0] + x), after = load(head.grad_after + chunk);
    of_K.sum(decay, tokens, before, after);
    this->carry(running[0] + x, before);
    before = this->rounded(running[1] + x), after = load(head.grad_after + chunk + keys);
    of_Q.sum(decay, tokens, before, after);
    this->carry(running[1] + x, before);
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

  // Through the feature map, and the counts, and out.
  void write(const Tensors &to, DecayedHead &head) {
    for (int64_t t = 0; t < head.tokens; t++)
      for (int x = 0; x < keys; x += LANES) {
        const int64_t here = t * keys + x;
        const Vector Q_slope = this->slope(to.q.at(t), x, load(head.Q + here));
        const Vector K_slope = this->slope(to.k.at(t), x, load(head.K + here));
        store_part(to.grad_q.at(t), call.key_channels, x, load(head.grad_Q + here) * Q_slope);
        store_part(to.grad_k.at(t), call.key_channels, x, load(head.grad_K + here) * K_slope);
      }
    if (wanted) write_decay(to, head);
  }

  void write_decay(const Tensors &to, DecayedHead &head) {
    double past = 0, ahead = 0;
    for (int64_t t = 0; t < head.tokens; t++) {
      past = t ? (past + head.grad_count[t - 1]) * decay_of(*to.log_decay.at(t)) : 0.;
      head.crossing[t] += (float)(past * (head.n[t] - head.past_count[t]));
    }
    for (int64_t t = head.tokens - 1; t >= 0; t--) {
      const float given = *to.log_decay.at(t);
      ahead += head.grad_count[t];
      *to.grad_log_decay.at(t) = given >= 0 ? 0.f : head.crossing[t] + (float)(ahead * head.past_count[t]);
      ahead *= decay_of(given);
    }
  }
};

}  // namespace
