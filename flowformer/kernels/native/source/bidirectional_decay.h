// The bidirectional form with decay, forward: passes over the chunks of one head.
#pragma once

#include "causal_backward.h"
#include "two_sided.h"

namespace {

// A pair of sums over tokens, of weighted keys and queries: what lies before and after each chunk (chunks, 2, keys).
struct PairOfSums {
  const float *key_weight, *query_weight;  // of each token
  float *before, *after;
};

// Everything of one head that outlives a pass, for every token; rows are padded to whole chunks.
struct DecayedHead {
  int64_t tokens;
  float *Q, *K;              // features (tokens, keys)
  PairOfSums plain, scaled;  // sum K and sum Q; sum K / O and sum Q / I
  float *ones, *inverse_in, *inverse_out;
  float *allocation, *logit;       // sigmoid(I^); O^, clamped
  float *inside;                   // 1 where the clamp does not bind, else 0
  float *weight, *n, *past_count;  // in the competition; decayed counts, of all tokens and of those before
  double *log_past, *log_ahead;    // log sum exp(O^) over the tokens before and after
  double *log_normaliser;          // over all
  float *partial;                  // (tokens, values): outputs, or d (w v), of the past and the chunk alone
  // Backward.
  float *grad_Q, *grad_K;        // (tokens, keys)
  float *grad_gate, *grad_flow;  // d (allocation / I); d w, then d O^
  float *sink_factor, *grad_in, *grad_out;
  float *grad_after;  // (chunks, 2, keys)
  float *crossing;    // d log-decay, or what it changes by from token to token
  float *grad_count;
  double *memory_marks, *growth_marks;  // before every token that is a multiple of Records::MARK

  DecayedHead(const FlowCall &call, int64_t tokens, int keys, int values, bool backward, Scratch &scratch)
      : tokens(tokens) {
    const int64_t chunks = (tokens + CHUNK - 1) / CHUNK, rows = chunks * CHUNK;
    const int64_t matrix = call.key_channels * call.value_channels;
    for (float **features : {&Q, &K}) *features = scratch.take<float>(rows * keys);
    for (PairOfSums *pair : {&plain, &scaled}) {
      pair->before = scratch.take<float>(chunks * 2 * keys), pair->after = scratch.take<float>(chunks * 2 * keys);
    }
    for (float **row : {&ones, &inverse_in, &inverse_out, &allocation, &logit, &inside, &weight, &n, &past_count})
      *row = scratch.take<float>(rows);
    for (double **row : {&log_past, &log_ahead, &log_normaliser}) *row = scratch.take<double>(rows);
    plain.key_weight = plain.query_weight = ones;
    scaled.key_weight = inverse_out, scaled.query_weight = inverse_in;
    partial = scratch.take<float>(rows * values);
    if (!backward) return;
    for (float **features : {&grad_Q, &grad_K}) *features = scratch.take<float>(rows * keys);
    for (float **row : {&grad_gate, &grad_flow, &sink_factor, &grad_in, &grad_out, &crossing, &grad_count})
      *row = scratch.take<float>(rows);
    grad_after = scratch.take<float>(chunks * 2 * keys);
    const int64_t marks = call.grad_log_decay.data ? Records::mark(tokens) : 0;
    for (double **matrices : {&memory_marks, &growth_marks}) *matrices = scratch.take<double>(marks * matrix);
  }

  int64_t last_chunk() const { return (tokens - 1) / CHUNK * CHUNK; }
  int in_chunk(int64_t at) const { return (int)(tokens - at < CHUNK ? tokens - at : CHUNK); }
};

template <class T>
struct BidirectionalDecay : CausalBackward<T, 0> {
  using Base = CausalBackward<T, 0>;
  using Base::call, Base::keys, Base::values, Base::V, Base::K_by_channel, Base::capacity, Base::gate, Base::decay;
  using typename Base::Tensors;
  double *running[4];  // sums of doubles, carried from chunk to chunk
  float *symmetric;    // gamma(i, j) of a chunk (CHUNK, CHUNK)

  BidirectionalDecay(const FlowCall &call, Scratch &scratch) : Base(call, scratch) {
    for (double *&sums : running) sums = scratch.take<double>(keys);
    symmetric = scratch.take<float>(CHUNK * CHUNK);
  }

  void clear_running() {
    for (double *sums : running) memset(sums, 0, sizeof(double) * keys);
  }

  void carry(double *sums, Vector added) const {
    for (int i = 0; i < LANES; i++) sums[i] = sums[i] * decay.whole + added[i];
  }

  static Vector rounded(const double *sums) {
    Vector x;
    for (int i = 0; i < LANES; i++) x[i] = (float)sums[i];
    return x;
  }

  void load_head(const Tensors &to, DecayedHead &head) {
    for (int64_t at = 0; at < head.tokens; at += CHUNK) {
      this->load_features(to.q, to.k, at, head.in_chunk(at));
      memcpy(head.Q + at * keys, this->Q, sizeof(float) * CHUNK * keys);
      memcpy(head.K + at * keys, this->K, sizeof(float) * CHUNK * keys);
      for (int t = 0; t < CHUNK; t++) head.ones[at + t] = 1.f;
    }
  }

  // Against time: what lies after each chunk, of w (K + e) and u (Q + e), or without e.
  void gather_after(const Tensors &to, const DecayedHead &head, const float *key_weight, const float *query_weight,
                    bool with_eps, float *after) {
    clear_running();
    for (int64_t at = head.last_chunk(); at >= 0; at -= CHUNK) {
      const int tokens = head.in_chunk(at);
      decay.load(to.log_decay, at, tokens);
      float *here = after + at / CHUNK * 2 * keys;
      for (int x = 0; x < keys; x += LANES) {
        const Vector small = with_eps ? load(this->eps + x) : Vector{};
        Vector of_keys{}, of_queries{};
        for (int t = tokens - 1; t >= 0; t--) {
          const int64_t place = (at + t) * keys + x;
          of_keys = (of_keys + (load(head.K + place) + small) * key_weight[at + t]) * decay.gamma[t];
          of_queries = (of_queries + (load(head.Q + place) + small) * query_weight[at + t]) * decay.gamma[t];
        }
        store(here + x, rounded(running[0] + x)), store(here + keys + x, rounded(running[1] + x));
        carry(running[0] + x, of_keys), carry(running[1] + x, of_queries);
      }
    }
  }

  // In the order of time: (Q + e) . (sum of w K + e) and (K + e) . (sum of u Q + e), and what lies before each chunk.
  void flows(const Tensors &to, const DecayedHead &head, const PairOfSums &pair, float *incoming, float *outgoing) {
    gather_after(to, head, pair.key_weight, pair.query_weight, false, pair.after);
    clear_running();
    for (int64_t at = 0; at < head.tokens; at += CHUNK) {
      const int tokens = head.in_chunk(at);
      decay.load(to.log_decay, at, tokens);
      float *before = pair.before + at / CHUNK * 2 * keys;
      const float *after = pair.after + at / CHUNK * 2 * keys;
      Vector of_sinks[CHUNK], of_sources[CHUNK];
      for (int t = 0; t < CHUNK; t++) of_sinks[t] = of_sources[t] = Vector{};
      for (int x = 0; x < keys; x += LANES) {
        const Vector small = load(this->eps + x);
        TwoSided K, Q;
        for (int t = 0; t < tokens; t++) {
          K.own[t] = load(head.K + (at + t) * keys + x) * pair.key_weight[at + t];
          Q.own[t] = load(head.Q + (at + t) * keys + x) * pair.query_weight[at + t];
        }
        two_sums(K, Q, x, before, after, tokens);
        for (int t = 0; t < tokens; t++) {
          of_sinks[t] += (load(head.Q + (at + t) * keys + x) + small) * (K.all(t) + small);
          of_sources[t] += (load(head.K + (at + t) * keys + x) + small) * (Q.all(t) + small);
        }
      }
      for (int t = 0; t < CHUNK; t += LANES)
        store(incoming + at + t, sums(of_sinks + t)), store(outgoing + at + t, sums(of_sources + t));
    }
  }

  // Both sums of a pair at a vector of channels. What lies before the chunk is carried in `running`, and kept.
  inline __attribute__((always_inline)) void two_sums(TwoSided &K, TwoSided &Q, int x, float *before,
                                                      const float *after, int tokens) {
    Vector of_keys = rounded(running[0] + x), of_queries = rounded(running[1] + x);
    store(before + x, of_keys), store(before + keys + x, of_queries);
    Vector keys_after = load(after + x), queries_after = load(after + keys + x);
    K.sum(decay, tokens, of_keys, keys_after), Q.sum(decay, tokens, of_queries, queries_after);
    carry(running[0] + x, of_keys), carry(running[1] + x, of_queries);
  }

  // All flows of a head, and the weights of its sources; for competition over heads the logits stand for them.
  void find_flows(const Tensors &to, DecayedHead &head) {
    flows(to, head, head.plain, head.inverse_in, head.inverse_out);
    const float small = (float)call.flow_eps;
    for (int64_t t = 0; t < head.tokens; t += LANES) {
      const auto there = lane_numbers() < (float)(head.tokens - t);
      store(head.inverse_in + t, there ? 1.f / (load(head.inverse_in + t) + small) : Vector{});
      store(head.inverse_out + t, there ? 1.f / (load(head.inverse_out + t) + small) : Vector{});
    }
    flows(to, head, head.scaled, head.allocation, head.logit);
    for (int64_t t = 0; t < head.tokens; t += LANES) {
      store(head.allocation + t, call.allocation ? sigmoid(load(head.allocation + t) + small) : all(1.f));
      const Vector flow = load(head.logit + t) + small, clamped = this->clamped(flow);
      store(head.inside + t, clamped == flow ? all(1.f) : Vector{});
      store(head.logit + t, clamped);
    }
    count(to.log_decay, head);
    if (call.competition == SEQUENCE) compete(to.log_decay, head);
    for (int64_t t = 0; call.competition != SEQUENCE && t < head.tokens; t++)
      head.weight[t] = call.competition == HEADS ? head.logit[t] : 1.f;
  }

  void count(const Rows<const float> &log_decay, DecayedHead &head) const {
    double past = 0, ahead = 0;
    for (int64_t t = 0; t < head.tokens; t++) {
      past = t ? (past + 1.) * decay_of(*log_decay.at(t)) : 0.;
      head.past_count[t] = (float)past, head.n[t] = (float)(past + 1.);
    }
    for (int64_t t = head.tokens - 1; t >= 0; t--) {
      head.n[t] += (float)ahead;
      ahead = (ahead + 1.) * decay_of(*log_decay.at(t));
    }
  }

  static double log_of(float log_decay) { return log_decay < 0 ? log_decay : 0.; }

  // Every sum in its logarithm: without a clamp a flow has no bound.
  void compete(const Rows<const float> &log_decay, DecayedHead &head) const {
    double past = LOG_ZERO, ahead = LOG_ZERO;
    for (int64_t t = 0; t < head.tokens; t++) {
      head.log_past[t] = past + log_of(*log_decay.at(t));
      past = add_logarithms(head.log_past[t], head.logit[t]);
    }
    for (int64_t t = head.tokens - 1; t >= 0; t--) {
      head.log_ahead[t] = ahead;
      const double from_here = add_logarithms(ahead, head.logit[t]);
      head.log_normaliser[t] = add_logarithms(head.log_past[t], from_here);
      head.weight[t] = head.n[t] * (float)std::exp(head.logit[t] - head.log_normaliser[t]);
      ahead = from_here + log_of(*log_decay.at(t));
    }
  }

  void fill_symmetric() {
    decay.fill_within();
    for (int i = 0; i < CHUNK; i++)
      for (int j = 0; j <= i; j++) symmetric[i * CHUNK + j] = symmetric[j * CHUNK + i] = decay.within[i * CHUNK + j];
  }

  // Outputs: of the past and the chunk, in the order of time; then, against it, of what lies ahead.
  void outputs(const Tensors &to, const Rows<T> &out, DecayedHead &head, Memory &memory, double *sum) {
    memory.start_from_zero(sum);
    for (int64_t at = 0; at < head.tokens; at += CHUNK) {
      const int tokens = head.in_chunk(at);
      const float *Q = head.Q + at * keys, *K = head.K + at * keys;
      decay.load(to.log_decay, at, tokens), fill_symmetric();
      this->load_values(to.v, at, tokens, head.weight + at);
      by_channel(K, keys, K_by_channel);
      square_product(Q, K_by_channel, keys, tokens, symmetric, capacity);
      each_strip(values, [&](auto width, int column) {
        for (int i = 0; i < tokens; i += ROWS) {
          Tile<width> tile;
          tile.add(Q + i * keys, keys, 1, memory.now + column * keys, 0, keys);
          tile.scale(decay.arriving + i);
          tile.add(capacity + i * CHUNK, CHUNK, 1, V + column * CHUNK, 0, tokens);
          this->put(tile, head.partial + (at + i) * values + column, values);
        }
      });
      this->scale_values(decay.leaving);
      memory.add(K, V, tokens, decay.whole);
    }
    memory.start_from_zero(sum);
    for (int64_t at = head.last_chunk(); at >= 0; at -= CHUNK) outputs_ahead(to, out, head, memory, at);
  }

  void outputs_ahead(const Tensors &to, const Rows<T> &out, DecayedHead &head, Memory &memory, int64_t at) {
    const int tokens = head.in_chunk(at);
    const float *Q = head.Q + at * keys, *K = head.K + at * keys;
    decay.load(to.log_decay, at, tokens);
    each_strip(values, [&](auto width, int column) {
      for (int i = 0; i < tokens; i += ROWS) {
        Tile<width> tile;
        tile.add(Q + i * keys, keys, 1, memory.now + column * keys, 0, keys);
        for (int r = 0; r < ROWS && i + r < tokens; r++)
          for (int m = 0; m < width; m++) {
            const int64_t t = at + i + r;
            const int x = column + m * LANES;
            const Vector whole = load(head.partial + t * values + x) + tile.sum[r][m] * decay.leaving[i + r];
            store_part(out.at(t), call.value_channels, x, whole * (head.allocation[t] * head.inverse_in[t]));
          }
      }
    });
    this->load_values(to.v, at, tokens, head.weight + at);
    this->scale_values(decay.arriving);
    memory.add(K, V, tokens, decay.whole);
  }
};

}  // namespace
