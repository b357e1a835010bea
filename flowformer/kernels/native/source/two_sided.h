// Both forms of decayed sums around a token, for sinks and sources that see each other in both directions.
//
// With decay, the bidirectional form sums x_j gamma(i, j) over all j: over the tokens before i, over those after it,
// and i itself. Either side is carried from chunk to chunk: one pass against time gathers what lies after each chunk,
// and one in the order of time has both. The mathematics is in flowformer/mechanisms/flow/decayed.py. gamma is
// symmetric, and so the derivative of such a sum is the same sum of derivatives; that of the log-decay of token t is
// what crosses from t - 1 to t:
//
//   sum over j < t <= i of gamma(i, j) (d S_i . x_j + d S_j . x_i)
#pragma once

#include "decay.h"

namespace {

// A vector of channels of the tokens of a chunk, and the decayed sums of it over the tokens before and after each.
struct TwoSided {
  Vector own[CHUNK], past[CHUNK], ahead[CHUNK];

  // `before` and `after` are the sums at the last token before the chunk, and at its last token, of what lies beyond.
  // They become the chunk's own share of the sums at its last token, and before its first.
  void sum(const Decay &decay, int tokens, Vector &before, Vector &after) {
    Vector forward{}, backward{};
    for (int t = 0; t < tokens; t++) {
      past[t] = forward * decay.gamma[t] + before * decay.arriving[t];
      forward = forward * decay.gamma[t] + own[t];
    }
    for (int t = tokens - 1; t >= 0; t--) {
      ahead[t] = backward + after * decay.leaving[t];
      backward = (backward + own[t]) * decay.gamma[t];
    }
    before = forward, after = backward;
  }

  inline __attribute__((always_inline)) Vector all(int t) const { return past[t] + own[t] + ahead[t]; }

  // What crosses to token t, with the derivatives of these sums.
  inline __attribute__((always_inline)) Vector crossing(const TwoSided &grad, int t) const {
    return (grad.own[t] + grad.ahead[t]) * past[t] + (own[t] + ahead[t]) * grad.past[t];
  }
};

// log(exp(a) + exp(b))
inline double add_logarithms(double a, double b) {
  const double larger = a > b ? a : b;
  return larger + std::log(std::exp(a - larger) + std::exp(b - larger));
}

}  // namespace
