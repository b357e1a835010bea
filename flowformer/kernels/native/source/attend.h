// Linear attention of features, the causal form, forward: one pass over chunks of tokens, with the products of
// Flow-Attention. With weights w of sources and scales a of sinks, 1 where there are none, and K_j = w_j phi(k_j),
//
//   y_t = a_t Q_t . M_t / (T_t + eps)     M_t = sum gamma(t, j) K_j^T v_j     T_t = Q_t . S_t, S_t = sum gamma(t, j)
//   K_j
//
// or a_t Q_t . M_t, where nothing is divided.
#pragma once

#include "causal.h"

namespace {

// What passes over the tokens of a head read beside q, k and v.
struct TokenFactors {
  Rows<const float> weight, scale;  // without data: 1

  TokenFactors(const AttendCall &call, int64_t sequence, int64_t head)
      : weight(rows_of<const float>(call.weight, call.flow.sources, sequence, head)),
        scale(rows_of<const float>(call.scale, call.flow.sinks, sequence, head)) {}

  static float at(const Rows<const float> &rows, int64_t token) { return rows.first ? *rows.at(token) : 1.f; }
  float weight_at(int64_t token) const { return at(weight, token); }
  float scale_at(int64_t token) const { return at(scale, token); }

  // Rows of keys times the weights of their tokens.
  void weigh(float *K, int keys, int64_t first, int tokens) const {
    for (int t = 0; weight.first && t < tokens; t++)
      for (int x = 0; x < keys; x += LANES) store(K + t * keys + x, load(K + t * keys + x) * *weight.at(first + t));
  }
};

template <class T>
struct Attend : Causal<T, 0> {
  using Base = Causal<T, 0>;
  using Base::keys, Base::Q, Base::K, Base::decay, Base::decays, Base::capacity, Base::gate;
  const AttendCall &attend;
  float *ones;         // (CHUNK)
  float *sums_before;  // S before the chunk

  Attend(const AttendCall &attend, Scratch &scratch) : Base(attend.flow, scratch), attend(attend) {
    ones = scratch.take<float>(CHUNK);
    sums_before = scratch.take<float>(keys);
  }

  void prepare() {
    Base::prepare();
    for (int t = 0; t < CHUNK; t++) ones[t] = 1.f;
  }

  // A chunk of one head. `sums` is S, padded; `next` is the chunk that is wanted after this one.
  void chunk(const typename Base::Place &place, const typename Base::Place &next, const TokenFactors &factors,
             Memory &memory, double *sums) {
    const int64_t at = place.at;
    const int tokens = (int)(place.last - at < CHUNK ? place.last - at : CHUNK);
    this->load_features(place.q, place.k, at, tokens);
    factors.weigh(K, keys, at, tokens);
    if (decays) decay.load(place.log_decay, at, tokens), decay.fill_within();
    this->load_values(place.v, at, tokens, ones);
    by_channel(K, keys, this->K_by_channel);
    lower_product(Q, this->K_by_channel, keys, tokens, decays ? decay.within : nullptr, capacity);
    for (int t = 0; t < tokens; t++) gate[t] = factors.scale_at(at + t);
    if (attend.divides) divide(tokens, sums);
    this->output(memory, place.out, at, tokens, next);
    if (decays) this->scale_values(decay.leaving);
    memory.add(K, this->V, tokens, decay.whole);
  }

  // gate / (T + eps); and the sums take the chunk in.
  void divide(int tokens, double *sums_so_far) {
    for (int x = 0; x < keys; x++) sums_before[x] = (float)sums_so_far[x];
    for (int first = 0; first < tokens; first += LANES) {
      Vector total[LANES];
      for (int t = 0; t < LANES; t++) {
        total[t] = Vector{};
        const int row = first + t;
        if (row >= tokens) continue;
        for (int x = 0; x < keys; x += LANES) total[t] += load(Q + row * keys + x) * load(sums_before + x);
        if (decays) total[t] *= decay.arriving[row];
        for (int column = 0; column <= row; column += LANES) total[t] += load(capacity + row * CHUNK + column);
      }
      store(gate + first, load(gate + first) / (sums(total) + (float)this->call.eps));
    }
    for (int x = 0; x < keys; x += LANES) {
      Vector added{};
      for (int t = 0; t < tokens; t++)
        added += decays ? load(K + t * keys + x) * decay.leaving[t] : load(K + t * keys + x);
      for (int i = 0; i < LANES; i++) sums_so_far[x + i] = sums_so_far[x + i] * decay.whole + added[i];
    }
  }
};

}  // namespace
