// The flows of a chunk of causal tokens, and the sums that carry the past from chunk to chunk. The mathematics is in
// flowformer/mechanisms/flow/operation.py.
#pragma once

#include <cmath>

#include "decay.h"
#include "memory.h"

namespace {

enum Competition { NONE, SEQUENCE, HEADS };

// How far a pass goes. Each stage wants the past of those before it; all but the last only gather a part of the past.
enum Stage { FEATURES, WEIGHTED, COMPETITION, MEMORY, OUTPUT };

// What the past leaves behind, but for the memory.
struct Past {
  double *sums[4];  // sum K, sum Q, sum K n / O, sum Q n / I, each padded
  double largest;   // sum exp(O^) = total * exp(largest)
  double total;
  double count;     // of tokens, decayed
  double log_kept;  // log-decay since the pass began

  Past(int keys, Scratch &scratch) {
    for (double *&sum : sums) sum = scratch.take<double>(keys);
  }

  // The past of a head in a state; nothing where there is none.
  void read(const State &state, int64_t index, int64_t channels, int keys) {
    const double *from = state.sums ? state.sums + index * 4 * channels : nullptr;
    for (int i = 0; i < 4; i++)
      for (int x = 0; x < keys; x++) sums[i][x] = from && x < channels ? from[i * channels + x] : 0.;
    largest = from ? state.log_normaliser[index] : LOG_ZERO;
    total = largest > LOG_ZERO / 2 ? 1. : 0.;
    count = state.count ? state.count[index] : 0.;
    log_kept = 0;
  }

  void write(double *to, int64_t channels) const {
    for (int i = 0; i < 4; i++) memcpy(to + i * channels, sums[i], sizeof(double) * channels);
  }

  double log_normaliser() const { return total > 0 ? largest + std::log(total) : LOG_ZERO; }
};

// KEYS: vectors of key channels, known to the compiler; 0: any number.
template <class T, int KEYS>
struct Flows {
  const FlowCall &call;
  const int keys;                       // key channels, padded
  Past *past;                           // of the head in hand
  float *eps;                           // eps at the channels there are, zero at padding
  float *real;                          // 1 at the channels there are, 0 at padding
  float *before[4];                     // sums before the chunk, as float; with eps unless there is decay
  float *running[4];                    // what the chunk has added to them
  float *Q, *K;                         // features (CHUNK, keys)
  float *inverse_in, *inverse_out;      // 1 / I, 1 / O
  float *in_weight, *out_weight;        // n / I, n / O
  float *conserved_in, *conserved_out;  // I^, O^; the latter not yet clamped
  float *share;                         // exp(O^) / sum exp(O^)
  float *weight;                        // of the values in the competition
  float *n;                             // position, counted from 1; with decay the decayed count
  const bool decays;
  Decay decay;        // of the chunk
  float *past_count;  // with decay: n without the token itself
  float *rest;        // with decay: 1 - share, exact where that is next to nothing

  Flows(const FlowCall &call, Scratch &scratch)
      : call(call), keys(padded(call.key_channels)), decays(call.log_decay.data != nullptr) {
    eps = scratch.take<float>(keys);
    real = scratch.take<float>(keys);
    for (int i = 0; i < 4; i++) {
      before[i] = scratch.take<float>(keys);
      running[i] = scratch.take<float>(keys);
    }
    Q = scratch.take<float>(CHUNK * keys);
    K = scratch.take<float>(CHUNK * keys);
    for (float **row : {&inverse_in, &inverse_out, &in_weight, &out_weight, &conserved_in, &conserved_out, &share,
                        &weight, &n, &past_count, &rest})
      *row = scratch.take<float>(CHUNK);
  }

  int key_vectors() const { return KEYS ? KEYS : keys / LANES; }

  // To be called once, when there is memory.
  void prepare() {
    for (int x = 0; x < keys; x++) {
      real[x] = x < call.key_channels;
      eps[x] = x < call.key_channels ? (float)call.eps : 0.f;
    }
  }

  // Q and K of tokens [first, first + tokens); zero beyond.
  void load_features(const Rows<const T> &q, const Rows<const T> &k, int64_t first, int tokens) {
    for (int t = 0; t < tokens; t++) {
      const T *q_row = q.at(first + t), *k_row = k.at(first + t);
      for (int x = 0; x < key_vectors(); x++) {
        Vector Q_part, K_part;
        if (KEYS) {
          Q_part = feature(load(q_row + x * LANES), call.feature_map);
          K_part = feature(load(k_row + x * LANES), call.feature_map);
        } else {
          const Vector there = load(real + x * LANES);
          Q_part = feature(load_part(q_row, call.key_channels, x * LANES), call.feature_map) * there;
          K_part = feature(load_part(k_row, call.key_channels, x * LANES), call.feature_map) * there;
        }
        store(Q + t * keys + x * LANES, Q_part);
        store(K + t * keys + x * LANES, K_part);
      }
    }
    memset(Q + tokens * keys, 0, sizeof(float) * (CHUNK - tokens) * keys);
    memset(K + tokens * keys, 0, sizeof(float) * (CHUNK - tokens) * keys);
  }

  // phi' at a part of a row of q or k whose features are given.
  inline __attribute__((always_inline)) Vector slope(const T *row, int at, Vector features) const {
    return feature_slope(call.feature_map ? load_part(row, call.key_channels, at) : features, features,
                         call.feature_map);
  }

  // Prepare for the tokens of a chunk: the sums before it.
  void open_chunk(int tokens) {
    for (int i = 0; i < 4; i++)
      for (int x = 0; x < keys; x++)
        before[i][x] = (float)past->sums[i][x] + (decays ? 0.f : eps[x]), running[i][x] = 0.f;
    if (decays) return count_decayed(tokens);
    for (int t = 0; t < CHUNK; t++) n[t] = (float)(past->count + t + 1);
    past->count += tokens;
  }

  void count_decayed(int tokens) {
    past->log_kept += decay.log_whole;
    for (int t = 0; t < CHUNK; t++) {
      n[t] = 1.f;
      if (t >= tokens) continue;
      const double earlier = past->count * decay.each[t];
      past_count[t] = (float)earlier;
      n[t] = (float)(past->count = earlier + 1.);
    }
  }

  // Add what the chunk has gathered in one pair of sums.
  void close_sums(int pair) {
    for (int i = pair; i < pair + 2; i++)
      for (int x = 0; x < keys; x++) past->sums[i][x] = past->sums[i][x] * decay.whole + running[i][x];
  }

  // sum K and sum Q alone.
  void add_features(int tokens) {
    for (int t = 0; t < tokens; t++)
      for (int x = 0; x < keys; x += LANES) {
        const float kept = decays ? decay.gamma[t] : 1.f;
        store(running[0] + x, load(running[0] + x) * kept + load(K + t * keys + x));
        store(running[1] + x, load(running[1] + x) * kept + load(Q + t * keys + x));
      }
    close_sums(0);
  }

  // One pair of flows of LANES tokens from `first` on: (Q + e) . (sum of w K + e) and (K + e) . (sum of u Q + e), w and
  // u being out_weight and in_weight, or 1. The sums take the tokens in.
  template <bool WEIGHTED, bool DECAYS>
  inline __attribute__((always_inline)) void pair_of_flows(int first, Vector &of_sinks, Vector &of_sources) {
    constexpr int SOME = 4;  // tokens whose sums stay in registers
    float *K_sum = running[WEIGHTED ? 2 : 0], *Q_sum = running[WEIGHTED ? 3 : 1];
    const float *K_before = before[WEIGHTED ? 2 : 0], *Q_before = before[WEIGHTED ? 3 : 1];
    Vector sinks[LANES], sources[LANES];
    for (int t = 0; t < LANES; t++) sinks[t] = sources[t] = Vector{};
    for (int start = 0; start < LANES; start += SOME)
      for (int x = 0; x < key_vectors(); x++) {
        const int at = x * LANES;
        const Vector small = load(eps + at), K_past = load(K_before + at), Q_past = load(Q_before + at);
        Vector K_now = load(K_sum + at), Q_now = load(Q_sum + at);
        for (int t = start; t < start + SOME; t++) {
          const Vector Q_t = load(Q + (first + t) * keys + at), K_t = load(K + (first + t) * keys + at);
          if (DECAYS) K_now *= decay.gamma[first + t], Q_now *= decay.gamma[first + t];
          K_now += WEIGHTED ? K_t * out_weight[first + t] : K_t;
          Q_now += WEIGHTED ? Q_t * in_weight[first + t] : Q_t;
          const float kept = decay.arriving[first + t];
          sinks[t] += (Q_t + small) * (K_now + (DECAYS ? K_past * kept + small : K_past));
          sources[t] += (K_t + small) * (Q_now + (DECAYS ? Q_past * kept + small : Q_past));
        }
        store(K_sum + at, K_now), store(Q_sum + at, Q_now);
      }
    of_sinks = sums(sinks), of_sources = sums(sources);
  }

  template <bool WEIGHTED>
  inline __attribute__((always_inline)) void pair_of_flows(int first, Vector &of_sinks, Vector &of_sources) {
    if (decays)
      pair_of_flows<WEIGHTED, true>(first, of_sinks, of_sources);
    else
      pair_of_flows<WEIGHTED, false>(first, of_sinks, of_sources);
  }

  // I and O of the chunk's tokens, as their inverses and n times those; zero where no token is.
  void first_flows(int tokens) {
    for (int t = 0; t < tokens; t += LANES) {
      Vector incoming, outgoing;
      pair_of_flows<false>(t, incoming, outgoing);
      const auto there = lane_numbers() + (float)t < (float)tokens;
      const Vector in = there ? 1.f / (incoming + (float)call.flow_eps) : Vector{};
      const Vector out = there ? 1.f / (outgoing + (float)call.flow_eps) : Vector{};
      store(inverse_in + t, in), store(inverse_out + t, out);
      store(in_weight + t, in * load(n + t)), store(out_weight + t, out * load(n + t));
    }
    close_sums(0);
  }

  // I^ and O^.
  void conserved_flows(int tokens) {
    for (int t = 0; t < tokens; t += LANES) {
      Vector incoming, outgoing;
      pair_of_flows<true>(t, incoming, outgoing);
      store(conserved_in + t, incoming / load(n + t) + (float)call.flow_eps);
      store(conserved_out + t, outgoing / load(n + t) + (float)call.flow_eps);
    }
    close_sums(2);
  }

  inline __attribute__((always_inline)) Vector clamped(Vector flow) const {
    return call.clamp < 0 ? flow : min(max(flow, all((float)-call.clamp)), all((float)call.clamp));
  }

  // Shares of the tokens in the competition along the sequence, each normalised over the sources up to its own time.
  // The largest O^ so far is taken out of every exponent.
  void compete(int tokens) {
    float exponent[CHUNK], total[CHUNK];
    double kept[CHUNK];
    for (int t = 0; t < tokens; t += LANES) store(exponent + t, clamped(load(conserved_out + t)));
    for (int t = 0; t < tokens; t++) {
      const double flow = exponent[t];
      kept[t] = 1.;
      if (decays) past->largest += decay.log_each[t];  // not the total: a large flow must not hide those after it
      if (flow > past->largest) kept[t] = std::exp(past->largest - flow), past->largest = flow;
      exponent[t] = (float)(flow - past->largest);
    }
    for (int t = 0; t < tokens; t += LANES) store(share + t, exp(load(exponent + t)));
    for (int t = 0; decays && t < tokens; t++) {
      const double earlier = past->total * kept[t];
      total[t] = (float)(past->total = earlier + share[t]);
      rest[t] = (float)(earlier / past->total);
    }
    for (int t = 0; !decays && t < tokens; t++) total[t] = (float)(past->total = past->total * kept[t] + share[t]);
    for (int t = tokens; t < CHUNK; t++) total[t] = 1.f;
    for (int t = 0; t < tokens; t += LANES) store(share + t, load(share + t) / load(total + t));
  }

  // The flows of a chunk whose features are loaded, up to a stage; whether the values are wanted next. For competition
  // over heads, `flows` takes O^ in stage COMPETITION and holds the weights later.
  bool flows_of_chunk(int tokens, Stage stage, float *flows) {
    if (stage == FEATURES) {
      add_features(tokens);
      return false;
    }
    first_flows(tokens);
    conserved_flows(tokens);
    if (stage == WEIGHTED) return false;
    if (call.competition == SEQUENCE) compete(tokens);
    if (stage == COMPETITION) {
      if (call.competition == HEADS)
        for (int t = 0; t < tokens; t++) flows[t] = clamped(all(conserved_out[t]))[0];
      return false;
    }
    for (int t = 0; t < tokens; t++)
      weight[t] = call.competition == SEQUENCE ? share[t] * n[t] : call.competition == HEADS ? flows[t] : 1.f;
    return true;
  }
};

}  // namespace
