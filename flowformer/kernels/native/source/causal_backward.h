// The causal form, backward. A pass in the order of time recomputes the flows and the memory; a pass against it carries
// what later tokens want of earlier ones. Written d x for the derivative of the loss with respect to x:
//
//   y_t = Q_t M_t, R_t = g_t y_t              d g_t = Q_t . P_t with P_t = M_t dR_t        d Q_t = g_t P_t
//   M_t = sum K_j^T w_j v_j                   G_t = sum_{i>=t} g_i Q_i^T dR_i              d K_t = G_t w_t v_t
//                                             d (w_t v_t) = K_t G_t                        d w_t = v_t . d (w_t v_t)
//   p_t = exp(c_t - Z_t), w_t = n_t p_t       U_t = (1 - p_{t+1}) U_{t+1} - d w_t w_t      d c_t = d w_t w_t + p_t U_t
//   I^_t = (Q_t + e) . (SKS_t + e) / n_t      X_t = sum_{i>=t} d I^_i (Q_i + e) / n_i      d Q_t = d I^_t (SKS_t + e) /
//   n_t SKS_t = sum K_j n_j / O_j                 d K_t = X_t n_t / O_t                        d O_t = - K_t . X_t n_t
//   / O_t^2 I_t = (Q_t + e) . (SK_t + e)              Z_t = sum_{i>=t} d I_i (Q_i + e)             d Q_t = d I_t (SK_t
//   + e) SK_t = sum K_j                            d K_t = Z_t
//
// and the same with sinks and sources exchanged: Y for X, W for Z. With decay, each such sum over later tokens decays
// as the one over earlier tokens does, and n_t, Z_t have derivatives of their own. That of the log-decay of token t is
//
//   <gamma_t S_{t-1}, d S_t>
//
// for each of the sums S, n and M; and (1 - p_t) U_t for Z.
#pragma once

#include "causal.h"
#include "decay_gradient.h"

namespace {

// How far a pass against time goes.
enum BackwardStage { GRAD_MEMORY, PRODUCTS, GRAD_WEIGHTED, GRAD_FEATURES, INPUTS };

template <class T, int KEYS>
struct CausalBackward : Causal<T, KEYS> {
  using Forward = Causal<T, KEYS>;
  using Forward::call, Forward::keys, Forward::columns, Forward::values, Forward::past, Forward::Q, Forward::K,
      Forward::V;
  using Forward::decay, Forward::decays;
  using Forward::K_by_channel, Forward::capacity, Forward::gate, Forward::n, Forward::weight;
  float *upstream;  // d R (CHUNK, values)
  float *upstream_strips;
  float *weighted;                       // w v (CHUNK, values)
  float *V_by_channel;                   // of w v (values, CHUNK) in strips
  float *agreement;                      // dR V^T, lower triangle (CHUNK, CHUNK)
  float *gated;                          // g Q (CHUNK, keys)
  float *key_strips;                     // K, or g Q, in strips
  float *transposed;                     // (values, keys) in strips
  float *grad_Q, *grad_K;                // (CHUNK, keys)
  float *sink_factor, *source_factor;    // d I^ / n, d O^ / n
  float *grad_incoming, *grad_outgoing;  // d I, d O
  // For the gradient of decay.
  float *futures[4];  // Z, W, X, Y of each token (CHUNK, keys)
  float *of_count;    // d n, by the flows
  DecayOfMemory of_memory;

  CausalBackward(const FlowCall &call, Scratch &scratch, int64_t further = 0) : Forward(call, scratch, further) {
    upstream = scratch.take<float>(CHUNK * values);
    upstream_strips = scratch.take<float>(CHUNK * values);
    weighted = scratch.take<float>(CHUNK * values);
    V_by_channel = scratch.take<float>(CHUNK * values);
    agreement = scratch.take<float>(CHUNK * CHUNK);
    gated = scratch.take<float>(CHUNK * keys);
    key_strips = scratch.take<float>(CHUNK * keys);
    transposed = scratch.take<float>(keys * values);
    grad_Q = scratch.take<float>(CHUNK * keys);
    grad_K = scratch.take<float>(CHUNK * keys);
    for (float **row : {&sink_factor, &source_factor, &grad_incoming, &grad_outgoing, &of_count})
      *row = scratch.take<float>(CHUNK);
    for (float *&rows : futures) rows = scratch.take<float>(call.grad_log_decay.data ? CHUNK * keys : 0);
  }

  // Where the tensors have the tokens of one head.
  struct Tensors {
    Rows<const T> q, k, v, grad_out;
    Rows<float> grad_q, grad_k;
    Rows<T> grad_v;
    Rows<const float> log_decay;
    Rows<float> grad_log_decay;

    Tensors(const FlowCall &call, int64_t sequence, int64_t head)
        : q(rows_of<const T>(call.q, call.sinks, sequence, head)),
          k(rows_of<const T>(call.k, call.sinks, sequence, head)),
          v(rows_of<const T>(call.v, call.sinks, sequence, head)),
          grad_out(rows_of<const T>(call.grad_out, call.sinks, sequence, head)),
          grad_q(rows_of<float>(call.grad_q, call.sinks, sequence, head)),
          grad_k(rows_of<float>(call.grad_k, call.sinks, sequence, head)),
          grad_v(rows_of<T>(call.grad_v, call.sinks, sequence, head)),
          log_decay(rows_of<const float>(call.log_decay, call.sinks, sequence, head)),
          grad_log_decay(rows_of<float>(call.grad_log_decay, call.sinks, sequence, head)) {}
  };

  // Fetch what the tile at row i and a column of a product leaves time for, of a chunk that starts with token `at`:
  // over all tiles, all of it. Fetched at once, it would have to be waited for.
  template <bool SECOND>
  inline __attribute__((always_inline)) void fetch_some(const Tensors &to, int64_t at, int64_t first, int64_t last,
                                                        int i, int column) const {
    const int strips = (keys + STRIP - 1) / STRIP, each = (ROWS + strips - 1) / strips;
    for (int t = 0; t < each; t++) {
      const int64_t token = at + i + column / STRIP * each + t;
      if (token < first) continue;
      fetch<0>(to.q, token, last, call.key_channels), fetch<0>(to.k, token, last, call.key_channels);
      fetch<0>(to.v, token, last, call.value_channels), fetch<0>(to.grad_out, token, last, call.value_channels);
      fetch<1>(to.grad_q, token, last, call.key_channels);
      if (!SECOND) continue;
      fetch<1>(to.grad_k, token, last, call.key_channels), fetch<1>(to.grad_v, token, last, call.value_channels);
    }
  }

  // Rows of a tensor, each times a factor (1 without factors); zero where no token is.
  void load_rows(const Rows<const T> &rows, int64_t first, int tokens, const float *factor, float *out) {
    for (int t = 0; t < CHUNK; t++)
      for (int x = 0; x < values; x += LANES) {
        Vector row = t < tokens ? load_part(rows.at(first + t), call.value_channels, x) : Vector{};
        if (factor && t < tokens) row *= factor[t];
        store(out + t * values + x, row);
      }
  }

  // In the order of time: records, and P as the first part of d Q, in grad_q.
  void recompute(int64_t sequence, int64_t head, int64_t first, int64_t last, Memory &memory, Records &records,
                 const float *weights) {
    const Tensors to(call, sequence, head);
    for (int64_t at = first; at < last; at += CHUNK) {
      const int tokens = (int)(last - at < CHUNK ? last - at : CHUNK);
      this->load_features(to.q, to.k, at, tokens);
      if (decays) decay.load(to.log_decay, at, tokens), decay.fill_within();
      this->open_chunk(tokens);
      if (records.wanted && at % Records::MARK == 0) mark(memory, at, records);
      for (int i = 0; i < 4; i++)
        memcpy(records.before + (at / CHUNK * 4 + i) * keys, this->before[i], sizeof(float) * keys);
      this->flows_of_chunk(tokens, OUTPUT, const_cast<float *>(weights ? weights + at : nullptr));
      record(records, at, tokens);
      load_rows(to.v, at, tokens, weight, weighted);
      load_rows(to.grad_out, at, tokens, nullptr, upstream);
      by_channel(weighted, values, V_by_channel);
      lower_product(upstream, V_by_channel, values, tokens, decays ? decay.within : nullptr, agreement);
      to_strips(K, CHUNK, keys, key_strips);
      project(memory, at, tokens, to, last, records);
      for (int t = 0; t < tokens; t++) {
        Vector dot{};
        for (int x = 0; x < keys; x += LANES) {
          const Vector P = load(grad_Q + t * keys + x);
          dot += P * load(Q + t * keys + x);
          store_part(to.grad_q.at(at + t), call.key_channels, x, P);
        }
        records.grad_gate[at + t] = sum(dot);
      }
      if (decays) scale_rows(weighted, values, decay.leaving);
      memory.add(weighted, key_strips, tokens, decay.whole);
    }
    if (records.wanted && last == length_of(sequence)) mark(memory, last, records);
  }

  int64_t length_of(int64_t sequence) const { return call.sinks.rows[3 * sequence + 2]; }

  static void scale_rows(float *rows, int columns, const float *factors) {
    for (int t = 0; t < CHUNK; t++)
      for (int x = 0; x < columns; x += LANES) store(rows + t * columns + x, load(rows + t * columns + x) * factors[t]);
  }

  // Keep the memory before a token.
  void mark(Memory &memory, int64_t at, Records &records) {
    memory.flush();
    const int64_t size = call.key_channels * columns;
    memcpy(records.marks + Records::mark(at) * size, memory.sum, sizeof(double) * size);
  }

  void record(Records &records, int64_t at, int tokens) {
    for (int t = 0; t < tokens; t += LANES) {
      store(records.inverse_in + at + t, load(this->inverse_in + t));
      store(records.inverse_out + at + t, load(this->inverse_out + t));
      store(records.allocation + at + t, call.allocation ? sigmoid(load(this->conserved_in + t)) : all(1.f));
      store(records.share + at + t, load((call.competition == HEADS ? weight : this->share) + t));
      const Vector flow = load(this->conserved_out + t);
      store(records.inside + at + t, this->clamped(flow) == flow ? all(1.f) : Vector{});
      if (decays) {
        store(records.past_count + at + t, load(this->past_count + t));
        store(records.rest + at + t, load(this->rest + t));
      }
      if (records.wanted) {
        store(records.conserved_in + at + t, load(this->conserved_in + t) - (float)call.flow_eps);
        store(records.conserved_out + at + t, flow - (float)call.flow_eps);
      }
    }
  }

  // grad_Q = dR memory + agreement K, the memory being (values, keys)
  void project(const Memory &memory, int64_t at, int tokens, const Tensors &to, int64_t last, Records &records) {
    Vector arrived[CHUNK];
    for (Vector &total : arrived) total = Vector{};
    each_strip(keys, [&](auto width, int column) {
      for (int i = 0; i < tokens; i += ROWS) {
        Tile<width> tile;
        fetch_some<false>(to, at + CHUNK, 0, last, i, column);
        tile.add(upstream + i * values, values, 1, memory.now + column * values, 0, values);
        if (decays) tile.scale(decay.arriving + i);
        if (records.wanted) tile.meet(Q + i * keys + column, keys, arrived + i);
        tile.add(agreement + i * CHUNK, CHUNK, 1, key_strips + column * CHUNK, 0,
                 i + ROWS < tokens ? i + ROWS : tokens);
        put(tile, grad_Q + i * keys + column, keys);
      }
    });
    for (int t = 0; records.wanted && t < tokens; t += LANES) store(records.arrived + at + t, sums(arrived + t));
  }

  template <int M>
  static void put(const Tile<M> &tile, float *out, int stride) {
    for (int r = 0; r < ROWS; r++)
      for (int m = 0; m < M; m++) store(out + r * stride + m * LANES, tile.sum[r][m]);
  }

  // Against time, tokens [first, last) of one head, up to a stage. `future` and the memory's gradient `growth` (keys,
  // values) start with what lies after `last`. With `apart`, the products are a pass of their own (stage PRODUCTS),
  // whose d K waits in grad_k and whose d w in the records.
  void against_time(int64_t sequence, int64_t head, int64_t first, int64_t last, BackwardStage stage, bool apart,
                    Memory &growth, Future &future, Records &records, double count) {
    if (first >= last) return;
    const Tensors to(call, sequence, head);
    for (int64_t at = first + (last - first - 1) / CHUNK * CHUNK; at >= first; at -= CHUNK) {
      const int tokens = (int)(last - at < CHUNK ? last - at : CHUNK);
      this->load_features(to.q, to.k, at, tokens);
      if (decays) decay.load(to.log_decay, at, tokens);
      for (int t = 0; t < CHUNK; t++) {
        n[t] = !decays ? (float)(count + at + t + 1) : t < tokens ? records.past_count[at + t] + 1.f : 1.f;
        gate[t] = t < tokens ? records.allocation[at + t] * records.inverse_in[at + t] : 0.f;
      }
      if (stage <= PRODUCTS || !apart) {
        load_rows(to.grad_out, at, tokens, nullptr, upstream);
        to_strips(upstream, CHUNK, values, upstream_strips);
        for (int t = 0; t < CHUNK; t++)
          for (int x = 0; x < keys; x += LANES) store(gated + t * keys + x, load(Q + t * keys + x) * gate[t]);
        if (stage != GRAD_MEMORY) {
          if (records.wanted) of_memory.restart_at_mark(at + tokens, length_of(sequence), growth, records);
          products(to, at, first, tokens, growth, records);
        }
        if (decays) scale_rows(gated, keys, decay.arriving);
        growth.add(gated, upstream_strips, tokens, decay.whole);
        if (records.wanted && stage != GRAD_MEMORY) of_memory.correct_at_mark(at, growth, records);
      }
      if (stage == GRAD_MEMORY) continue;
      if (call.competition == SEQUENCE && !apart)
        future.normaliser = normalise(at, at + tokens, count, future.normaliser, records);
      if (stage == PRODUCTS) {
        for (int t = 0; t < tokens; t++)
          for (int x = 0; x < keys; x += LANES)
            store_part(to.grad_k.at(at + t), call.key_channels, x, load(grad_K + t * keys + x));
        continue;
      }
      for (int t = 0; t < CHUNK; t++)
        for (int x = 0; x < keys; x += LANES) {
          const bool there = t < tokens;
          store(grad_Q + t * keys + x,
                there ? load_part(to.grad_q.at(at + t), call.key_channels, x) * gate[t] : Vector{});
          if (apart)
            store(grad_K + t * keys + x, there ? load_part(to.grad_k.at(at + t), call.key_channels, x) : Vector{});
        }
      flows_against_time(at, tokens, stage, future, records);
      if (stage == INPUTS) write_inputs(to.q, to.k, to.grad_q, to.grad_k, at, tokens);
    }
  }

  // d K and d (w v) of the chunk, and of them d v and d w.
  void products(const Tensors &to, int64_t at, int64_t first, int tokens, const Memory &growth, Records &records) {
    for (int t = 0; t < tokens; t++) {
      const float share = records.share[at + t];
      weight[t] = call.competition == NONE ? 1.f : call.competition == HEADS ? share : share * n[t];
    }
    load_rows(to.v, at, tokens, weight, weighted);
    multiply(to, at, first, tokens, growth, records);
  }

  // The same of the rows in `weighted`.
  void multiply(const Tensors &to, int64_t at, int64_t first, int tokens, const Memory &growth, Records &records) {
    by_channel(weighted, values, V_by_channel);
    if (decays) decay.fill_within();
    const float *within = decays ? decay.within : nullptr;
    lower_product(upstream, V_by_channel, values, tokens, records.wanted ? nullptr : within, agreement);
    by_channel(K, keys, K_by_channel);
    lower_product(gated, K_by_channel, keys, tokens, within, capacity);
    if (records.wanted) of_memory.meet(capacity, agreement, within, tokens);
    to_strips(gated, CHUNK, keys, key_strips);
    transpose_growth(growth);
    each_strip(keys, [&](auto width, int column) {
      for (int j = 0; j < tokens; j += ROWS) {
        Tile<width> tile;
        fetch_some<true>(to, at - CHUNK, first, at, j, column);
        tile.add(weighted + j * values, values, 1, transposed + column * values, 0, values);
        if (decays) tile.scale(decay.leaving + j);
        tile.add(agreement + j, 1, CHUNK, key_strips + column * CHUNK, j, tokens);
        put(tile, grad_K + j * keys + column, keys);
      }
    });
    Vector of_weight[CHUNK], left[CHUNK];
    for (Vector &total : of_weight) total = Vector{};
    for (Vector &total : left) total = Vector{};
    each_strip(values, [&](auto width, int column) {
      for (int j = 0; j < tokens; j += ROWS) {
        Tile<width> tile;
        tile.add(K + j * keys, keys, 1, growth.now + column * keys, 0, keys);
        if (decays) tile.scale(decay.leaving + j);
        if (records.wanted) tile.meet(weighted + j * values + column, values, left + j);
        tile.add(capacity + j, 1, CHUNK, upstream_strips + column * CHUNK, j, tokens);
        for (int r = 0; r < ROWS && j + r < tokens; r++)
          for (int m = 0; m < width; m++) {
            const int x = column + m * LANES;
            of_weight[j + r] += tile.sum[r][m] * load_part(to.v.at(at + j + r), call.value_channels, x);
            store_part(to.grad_v.at(at + j + r), call.value_channels, x, tile.sum[r][m] * weight[j + r]);
          }
      }
    });
    for (int t = 0; t < tokens; t += LANES) store(records.grad_flow + at + t, sums(of_weight + t));
    if (records.wanted) of_memory.finish(at, tokens, gate, left, records);
  }

  // growth.now (keys, values) to transposed (values, keys), both in strips
  void transpose_growth(const Memory &growth) {
    each_strip(values, [&](auto from_width, int from) {
      each_strip(keys, [&](auto to_width, int to) {
        for (int m = 0; m < from_width; m++)
          for (int l = 0; l < to_width; l++) {
            Vector block[LANES];
            for (int i = 0; i < LANES; i++)
              block[i] = load(growth.now + from * keys + ((to + l * LANES + i) * from_width + m) * LANES);
            transpose(block);
            for (int i = 0; i < LANES; i++)
              store(transposed + to * values + ((from + m * LANES + i) * to_width + l) * LANES, block[i]);
          }
      });
    });
  }

  // d w to d c, in the records, for competition along the sequence; tokens [first, last), `count` before the first of
  // all.
  static double normalise(int64_t first, int64_t last, double count, double of_normaliser, const Records &records) {
    for (int64_t t = last - 1; t >= first; t--) {
      const double n = records.decays ? records.past_count[t] + 1. : count + t + 1;
      const double share = records.share[t], wanted = records.grad_flow[t] * n * share;
      of_normaliser -= wanted;
      if (records.wanted) records.grad_count[t] += records.grad_flow[t] * (float)share;
      records.grad_flow[t] = (float)(wanted + of_normaliser * share);
      of_normaliser *= records.decays && share > 0.5 ? records.rest[t] : 1. - share;
      if (records.wanted) records.grad_decay[t] += (float)of_normaliser;
    }
    return of_normaliser;
  }

  // What the flows add to grad_Q and grad_K, and the sums of `future`; with a stage before INPUTS only some of the
  // sums.
  void flows_against_time(int64_t at, int tokens, BackwardStage stage, Future &future, const Records &records) {
    for (int t = 0; t < CHUNK; t++) {
      sink_factor[t] = source_factor[t] = grad_incoming[t] = grad_outgoing[t] = this->in_weight[t] =
          this->out_weight[t] = 0.f;
      if (t >= tokens) continue;
      const float allocation = records.allocation[at + t], inverse = records.inverse_in[at + t];
      const float of_gate = records.grad_gate[at + t];
      if (call.allocation) sink_factor[t] = of_gate * inverse * allocation * (1.f - allocation) / n[t];
      if (call.competition != NONE) source_factor[t] = records.inside[at + t] * records.grad_flow[at + t] / n[t];
      grad_incoming[t] = -of_gate * allocation * inverse * inverse;
      this->in_weight[t] = n[t] * inverse;
      this->out_weight[t] = n[t] * records.inverse_out[at + t];
    }
    if (decays)
      weighted_against_time<true>(at, tokens, future, records);
    else
      weighted_against_time<false>(at, tokens, future, records);
    if (stage == GRAD_WEIGHTED) return;
    if (decays)
      features_against_time<true>(tokens, future, records);
    else
      features_against_time<false>(tokens, future, records);
    if (stage == GRAD_FEATURES) return;
    if (decays) return decayed_sums_to_inputs(at, tokens, records);
    const float *before = records.before + at / CHUNK * 4 * keys;
    for (int x = 0; x < keys; x += LANES) {
      Vector now[4];
      for (int i = 0; i < 4; i++) now[i] = load(before + i * keys + x);
      Vector run[4] = {Vector{}, Vector{}, Vector{}, Vector{}};
      for (int t = 0; t < tokens; t++) {
        const int here = t * keys + x;
        const Vector Q_t = load(Q + here), K_t = load(K + here);
        run[0] += K_t, run[1] += Q_t, run[2] += K_t * this->out_weight[t], run[3] += Q_t * this->in_weight[t];
        Vector of_Q = load(grad_Q + here), of_K = load(grad_K + here);
        of_Q += (run[0] + now[0]) * grad_incoming[t] + (run[2] + now[2]) * sink_factor[t];
        of_K += (run[1] + now[1]) * grad_outgoing[t] + (run[3] + now[3]) * source_factor[t];
        store(grad_Q + here, of_Q), store(grad_K + here, of_K);
      }
    }
  }

  // X and Y: from I^ and O^ to the weighted sums, and on to I and O.
  template <bool DECAYS>
  void weighted_against_time(int64_t at, int tokens, Future &future, const Records &records) {
    Vector of_out[CHUNK], of_in[CHUNK];
    for (int t = 0; t < CHUNK; t++) of_out[t] = of_in[t] = Vector{};
    for (int x = 0; x < keys; x += LANES) {
      const Vector small = load(this->eps + x);
      Vector X = Vector{}, Y = Vector{}, X_after, Y_after;
      for (int i = 0; i < LANES; i++)
        X_after[i] = (float)future.sums[2][x + i], Y_after[i] = (float)future.sums[3][x + i];
      for (int t = tokens - 1; t >= 0; t--) {
        const int here = t * keys + x;
        const Vector Q_t = load(Q + here), K_t = load(K + here);
        X += (Q_t + small) * sink_factor[t], Y += (K_t + small) * source_factor[t];
        const Vector X_t = X + (DECAYS ? X_after * decay.leaving[t] : X_after);
        const Vector Y_t = Y + (DECAYS ? Y_after * decay.leaving[t] : Y_after);
        of_out[t] += K_t * X_t, of_in[t] += Q_t * Y_t;
        store(grad_K + here, load(grad_K + here) + X_t * this->out_weight[t]);
        store(grad_Q + here, load(grad_Q + here) + Y_t * this->in_weight[t]);
        if (DECAYS && records.wanted) store(futures[2] + here, X_t), store(futures[3] + here, Y_t);
        if (DECAYS) X *= decay.gamma[t], Y *= decay.gamma[t];
      }
      grow(future.sums[2] + x, X), grow(future.sums[3] + x, Y);
    }
    for (int t = 0; t < tokens; t += LANES) {
      const Vector into = sums(of_in + t), out = sums(of_out + t);
      for (int i = 0; i < LANES && t + i < tokens; i++) {
        grad_incoming[t + i] -= this->in_weight[t + i] * records.inverse_in[at + t + i] * into[i];
        grad_outgoing[t + i] = -this->out_weight[t + i] * records.inverse_out[at + t + i] * out[i];
        if (DECAYS && records.wanted) count_gradient(t + i, at + t + i, into[i], out[i], records);
      }
    }
  }

  // d n of token t of the chunk, by n / I, n / O and the division of I^ and O^ by n.
  void count_gradient(int t, int64_t token, float into, float out, const Records &records) {
    of_count[t] = into * records.inverse_in[token] + out * records.inverse_out[token] -
                  sink_factor[t] * records.conserved_in[token] - source_factor[t] * records.conserved_out[token];
  }

  // What the tokens before the chunk see of the future.
  void grow(double *sums, Vector added) const {
    for (int i = 0; i < LANES; i++) sums[i] = sums[i] * decay.whole + added[i];
  }

  // Z and W: from I and O to the sums of features.
  template <bool DECAYS>
  void features_against_time(int tokens, Future &future, const Records &records) {
    for (int x = 0; x < keys; x += LANES) {
      const Vector small = load(this->eps + x);
      Vector Z = Vector{}, W = Vector{}, Z_after, W_after;
      for (int i = 0; i < LANES; i++)
        Z_after[i] = (float)future.sums[0][x + i], W_after[i] = (float)future.sums[1][x + i];
      for (int t = tokens - 1; t >= 0; t--) {
        const int here = t * keys + x;
        Z += (load(Q + here) + small) * grad_incoming[t], W += (load(K + here) + small) * grad_outgoing[t];
        const Vector Z_t = Z + (DECAYS ? Z_after * decay.leaving[t] : Z_after);
        const Vector W_t = W + (DECAYS ? W_after * decay.leaving[t] : W_after);
        store(grad_K + here, load(grad_K + here) + Z_t);
        store(grad_Q + here, load(grad_Q + here) + W_t);
        if (DECAYS && records.wanted) store(futures[0] + here, Z_t), store(futures[1] + here, W_t);
        if (DECAYS) Z *= decay.gamma[t], W *= decay.gamma[t];
      }
      grow(future.sums[0] + x, Z), grow(future.sums[1] + x, W);
    }
  }

  // What the sums over the past give to d Q and d K of their own token; and to d log-decay.
  void decayed_sums_to_inputs(int64_t at, int tokens, const Records &records) {
    const float *before = records.before + at / CHUNK * 4 * keys;
    Vector of_decay[CHUNK];
    for (Vector &total : of_decay) total = Vector{};
    for (int x = 0; x < keys; x += LANES) {
      const Vector small = load(this->eps + x);
      Vector sum[4];
      for (int i = 0; i < 4; i++) sum[i] = load(before + i * keys + x);
      for (int t = 0; t < tokens; t++) {
        const int here = t * keys + x;
        const Vector Q_t = load(Q + here), K_t = load(K + here);
        for (Vector &past : sum) past *= decay.gamma[t];
        for (int i = 0; records.wanted && i < 4; i++) of_decay[t] += sum[i] * load(futures[i] + here);
        sum[0] += K_t, sum[1] += Q_t, sum[2] += K_t * this->out_weight[t], sum[3] += Q_t * this->in_weight[t];
        const Vector of_Q = (sum[0] + small) * grad_incoming[t] + (sum[2] + small) * sink_factor[t];
        const Vector of_K = (sum[1] + small) * grad_outgoing[t] + (sum[3] + small) * source_factor[t];
        store(grad_Q + here, load(grad_Q + here) + of_Q), store(grad_K + here, load(grad_K + here) + of_K);
      }
    }
    for (int t = 0; records.wanted && t < tokens; t += LANES) {
      float *grad = records.grad_decay + at + t, *count = records.grad_count + at + t;
      store(grad, load(grad) + sums(of_decay + t)), store(count, load(count) + load(of_count + t));
    }
  }

  // Through the feature map, and out.
  void write_inputs(const Rows<const T> &q, const Rows<const T> &k, const Rows<float> &grad_q,
                    const Rows<float> &grad_k, int64_t at, int tokens) {
    for (int t = 0; t < tokens; t++)
      for (int x = 0; x < keys; x += LANES) {
        const int here = t * keys + x;
        const Vector Q_slope = this->slope(q.at(at + t), x, load(Q + here));
        const Vector K_slope = this->slope(k.at(at + t), x, load(K + here));
        store_part(grad_q.at(at + t), call.key_channels, x, load(grad_Q + here) * Q_slope);
        store_part(grad_k.at(at + t), call.key_channels, x, load(grad_K + here) * K_slope);
      }
  }
};

}  // namespace
