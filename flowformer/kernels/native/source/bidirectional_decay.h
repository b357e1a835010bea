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
  float *V;                  // (tokens, values)
  PairOfSums plain, scaled;  // sum K and sum Q; sum K / O and sum Q / I
  float *ones, *inverse_in, *inverse_out;
  float *allocation, *logit;       // sigmoid(I^); O^, clamped
  float *inside;                   // 1 where the clamp does not bind, else 0
  float *weight, *n, *past_count;  // in the competition; decayed counts, of all tokens and of those before
  double *log_past, *log_ahead;    // log sum exp(O^) over the tokens before and after
  double *log_normaliser;          // over all
  float *partial;                  // (tokens, values): outputs, or d (w v), of the past and the chunk alone
  // Backward.
  float *upstream;               // d R (tokens, values)
  float *grad_Q, *grad_K;        // (tokens, keys)
  float *grad_gate, *grad_flow;  // d (allocation / I); d w, then d O^
  float *sink_factor, *grad_in, *grad_out;
  float *grad_after;  // (chunks, 2, keys)
  float *crossing;    // d log-decay, or what it changes by from token to token
  float *grad_count;
  double *memory_marks, *growth_marks;  // before every token that is a multiple of Records::MARK

  // `columns`: of the memory.
  DecayedHead(const FlowCall &call, int64_t tokens, int keys, int64_t columns, bool backward, Scratch &scratch)
      : tokens(tokens) {
    const int64_t chunks = (tokens + CHUNK - 1) / CHUNK, rows = chunks * CHUNK;
    const int64_t matrix = call.key_channels * columns;
    const int values = padded(columns);
    for (float **features : {&Q, &K}) *features = scratch.take<float>(rows * keys);
    for (PairOfSums *pair : {&plain, &scaled}) {
      pair->before = scratch.take<float>(chunks * 2 * keys), pair->after = scratch.take<float>(chunks * 2 * keys);
    }
    for (float **row : {&ones, &inverse_in, &inverse_out, &allocation, &logit, &inside, &weight, &n, &past_count})
      *row = scratch.take<float>(rows);
    for (double **row : {&log_past, &log_ahead, &log_normaliser}) *row = scratch.take<double>(rows);
    plain.key_weight = plain.query_weight = ones;
    scaled.key_weight = inverse_out, scaled.query_weight = inverse_in;
    for (float **of_values : {&V, &partial}) *of_values = scratch.take<float>(rows * values);
    if (!backward) return;
    upstream = scratch.take<float>(rows * values);
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

// All of it in floats: only what is read first and written last has the type of the inputs.
struct BidirectionalDecay : CausalBackward<float, 0> {
  using Base = CausalBackward<float, 0>;
  double *running[4];  // sums of doubles, carried from chunk to chunk
  float *symmetric;    // gamma(i, j) of a chunk (CHUNK, CHUNK)

  BidirectionalDecay(const FlowCall &call, Scratch &scratch, int64_t further = 0) : Base(call, scratch, further) {
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

  template <class T>
  void load_head(int64_t sequence, int64_t h, DecayedHead &head) {
    const auto q = rows_of<const T>(call.q, call.sinks, sequence, h),
               k = rows_of<const T>(call.k, call.sinks, sequence, h);
    const auto v = rows_of<const T>(call.v, call.sinks, sequence, h);
    const auto grad_out = rows_of<const T>(call.grad_out, call.sinks, sequence, h);
    const int64_t rows = head.last_chunk() + CHUNK;
    for (int64_t t = 0; t < rows; t++) {
      const bool there = t < head.tokens;
      for (int x = 0; x < keys; x += LANES) {
        const Vector exists = there ? load(real + x) : Vector{};
        store(head.Q + t * keys + x, there ? phi(q.at(t), x) * exists : exists);
        store(head.K + t * keys + x, there ? phi(k.at(t), x) * exists : exists);
      }
      for (int x = 0; x < values; x += LANES) {
        store(head.V + t * values + x, there ? load_part(v.at(t), call.value_channels, x) : Vector{});
        if (grad_out.first)
          store(head.upstream + t * values + x, there ? load_part(grad_out.at(t), call.value_channels, x) : Vector{});
      }
      head.ones[t] = 1.f, head.weight[t] = 0.f;  // the latter stays where no token is
    }
  }

  template <class T>
  Vector phi(const T *row, int at) const {
    return feature(load_part(row, call.key_channels, at), call.feature_map);
  }

  // Values of a chunk times their weights and a factor, in strips.
  void load_values(const DecayedHead &head, int64_t at, const float *factor) {
    each_strip(values, [&](auto width, int column) {
      for (int t = 0; t < CHUNK; t++)
        for (int m = 0; m < width; m++) {
          const Vector value = load(head.V + (at + t) * values + column + m * LANES);
          store(V + column * CHUNK + (t * width + m) * LANES,
                value * (head.weight[at + t] * (factor ? factor[t] : 1.f)));
        }
    });
  }

  // Against time: what lies after each chunk, of w (K + e) and u (Q + e), or without e.
  void gather_after(const Rows<const float> &log_decay, const DecayedHead &head, const float *key_weight,
                    const float *query_weight, bool with_eps, float *after) {
    clear_running();
    for (int64_t at = head.last_chunk(); at >= 0; at -= CHUNK) {
      const int tokens = head.in_chunk(at);
      decay.load(log_decay, at, tokens);
      float *here = after + at / CHUNK * 2 * keys;
      for (int x = 0; x < keys; x += LANES) {
        const Vector small = with_eps ? load(eps + x) : Vector{};
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
  void flows(const Rows<const float> &log_decay, const DecayedHead &head, const PairOfSums &pair, float *incoming,
             float *outgoing) {
    gather_after(log_decay, head, pair.key_weight, pair.query_weight, false, pair.after);
    clear_running();
    for (int64_t at = 0; at < head.tokens; at += CHUNK) {
      const int tokens = head.in_chunk(at);
      decay.load(log_decay, at, tokens);
      float *before = pair.before + at / CHUNK * 2 * keys;
      const float *after = pair.after + at / CHUNK * 2 * keys;
      Vector of_sinks[CHUNK], of_sources[CHUNK];
      for (int t = 0; t < CHUNK; t++) of_sinks[t] = of_sources[t] = Vector{};
      for (int x = 0; x < keys; x += LANES) {
        const Vector small = load(eps + x);
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
  void find_flows(const Rows<const float> &log_decay, DecayedHead &head) {
    flows(log_decay, head, head.plain, head.inverse_in, head.inverse_out);
    const float small = (float)call.flow_eps;
    for (int64_t t = 0; t < head.tokens; t += LANES) {
      const auto there = lane_numbers() < (float)(head.tokens - t);
      store(head.inverse_in + t, there ? 1.f / (load(head.inverse_in + t) + small) : Vector{});
      store(head.inverse_out + t, there ? 1.f / (load(head.inverse_out + t) + small) : Vector{});
    }
    flows(log_decay, head, head.scaled, head.allocation, head.logit);
    for (int64_t t = 0; t < head.tokens; t += LANES) {
      store(head.allocation + t, call.allocation ? sigmoid(load(head.allocation + t) + small) : all(1.f));
      const Vector flow = load(head.logit + t) + small, bounded = clamped(flow);
      store(head.inside + t, bounded == flow ? all(1.f) : Vector{});
      store(head.logit + t, bounded);
    }
    count(log_decay, head);
    if (call.competition == SEQUENCE) compete(log_decay, head);
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

  // Every sum in its logarithm: without a clamp a flow has no bound.
  void compete(const Rows<const float> &log_decay, DecayedHead &head) const {
    double past = LOG_ZERO, ahead = LOG_ZERO;
    for (int64_t t = 0; t < head.tokens; t++) {
      head.log_past[t] = past + clip_log_decay(*log_decay.at(t));
      past = add_logarithms(head.log_past[t], head.logit[t]);
    }
    for (int64_t t = head.tokens - 1; t >= 0; t--) {
      head.log_ahead[t] = ahead;
      const double from_here = add_logarithms(ahead, head.logit[t]);
      head.log_normaliser[t] = add_logarithms(head.log_past[t], from_here);
      head.weight[t] = head.n[t] * (float)std::exp(head.logit[t] - head.log_normaliser[t]);
      ahead = from_here + clip_log_decay(*log_decay.at(t));
    }
  }

  void fill_symmetric() {
    decay.fill_within();
    for (int i = 0; i < CHUNK; i++)
      for (int j = 0; j <= i; j++) symmetric[i * CHUNK + j] = symmetric[j * CHUNK + i] = decay.within[i * CHUNK + j];
  }

  // Outputs: of the past and the chunk, in the order of time; then, against it, of what lies ahead.
  void outputs(const Rows<const float> &log_decay, DecayedHead &head, Memory &memory, double *sum) {
    memory.start_from_zero(sum);
    for (int64_t at = 0; at < head.tokens; at += CHUNK) {
      const int tokens = head.in_chunk(at);
      const float *Q = head.Q + at * keys, *K = head.K + at * keys;
      decay.load(log_decay, at, tokens), fill_symmetric();
      load_values(head, at, nullptr);
      by_channel(K, keys, K_by_channel);
      square_product(Q, K_by_channel, keys, tokens, symmetric, capacity);
      each_strip(values, [&](auto width, int column) {
        for (int i = 0; i < tokens; i += ROWS) {
          Tile<width> tile;
          tile.add(Q + i * keys, keys, 1, memory.now + column * keys, 0, keys);
          tile.scale(decay.arriving + i);
          tile.add(capacity + i * CHUNK, CHUNK, 1, V + column * CHUNK, 0, tokens);
          put(tile, head.partial + (at + i) * values + column, values);
        }
      });
      load_values(head, at, decay.leaving);
      memory.add(K, V, tokens, decay.whole);
    }
    memory.start_from_zero(sum);
    for (int64_t at = head.last_chunk(); at >= 0; at -= CHUNK) outputs_ahead(log_decay, head, memory, at);
  }

  void outputs_ahead(const Rows<const float> &log_decay, DecayedHead &head, Memory &memory, int64_t at) {
    const int tokens = head.in_chunk(at);
    const float *Q = head.Q + at * keys, *K = head.K + at * keys;
    decay.load(log_decay, at, tokens);
    each_strip(values, [&](auto width, int column) {
      for (int i = 0; i < tokens; i += ROWS) {
        Tile<width> tile;
        tile.add(Q + i * keys, keys, 1, memory.now + column * keys, 0, keys);
        tile.scale(decay.leaving + i);
        join(tile, false, head.partial + (at + i) * values + column, values);
      }
    });
    load_values(head, at, decay.arriving);
    memory.add(K, V, tokens, decay.whole);
  }

  // Write a tile, or add it to what is there.
  template <int M>
  static void join(const Tile<M> &tile, bool first, float *out, int stride) {
    for (int r = 0; r < ROWS; r++)
      for (int m = 0; m < M; m++) {
        float *place = out + r * stride + m * LANES;
        store(place, first ? tile.sum[r][m] : load(place) + tile.sum[r][m]);
      }
  }

  template <class T>
  void write_outputs(const Rows<T> &out, const DecayedHead &head) const {
    for (int64_t t = 0; t < head.tokens; t++)
      for (int x = 0; x < values; x += LANES)
        store_part(out.at(t), call.value_channels, x,
                   load(head.partial + t * values + x) * (head.allocation[t] * head.inverse_in[t]));
  }
};

}  // namespace
