// The gradient of log-decays, against time.
//
// For a sum S_t = gamma_t S_{t-1} + x_t it is <gamma_t S_{t-1}, d S_t>. For the K x V memory M, with x_j = K_j^T w_j
// v_j and the growth G = sum_i g_i Q_i^T dR_i that later tokens want of it, that is the sum of gamma(i, j) <g_i Q_i^T
// dR_i, x_j> over the pairs j < t <= i. From one token to the next it changes by the pairs of one sink and of one
// source, which are there already. The pair of a token with itself is in none of them: where gamma vanishes, so does
// the gradient, to the last digit.
#pragma once

#include "decay.h"
#include "memory.h"
#include "records.h"

namespace {

// Of tokens [first, end), gathered from the last to the first, which are off by `drift` there. Those at the end of
// which nothing is wanted stay zero.
inline void spread_drift(double drift, int64_t first, int64_t end, float *gradient) {
  while (end > first && gradient[end - 1] == 0.f) end--;
  if (end == first) return;
  const double each = drift / (double)(end - first);
  for (int64_t t = first; t < end; t++) gradient[t] -= (float)(each * (double)(end - t));
}

struct DecayOfMemory {
  double later;         // the gradient of the token after the chunk
  int64_t end;          // the token at which it was exact
  float nearby[CHUNK];  // pairs within the chunk: those of sink t less those of source t

  // Start anew from the exact product where the memory was kept: over many tokens, rounded differences would add up.
  void restart_at_mark(int64_t token, int64_t length, Memory &growth, const Records &records) {
    if (token % Records::MARK && token < length) return;
    later = exact(token, growth, records), end = token;
  }

  // What rounding has added up since then shows at the next mark: take it back, each token's share.
  void correct_at_mark(int64_t token, Memory &growth, const Records &records) const {
    if (token % Records::MARK) return;
    spread_drift(later - exact(token, growth, records), token, end, records.grad_decay);
  }

  static double exact(int64_t token, Memory &growth, const Records &records) {
    growth.flush();
    const int64_t size = growth.real_rows * growth.real_columns;
    const double *memory = records.marks + Records::mark(token) * size;
    double total = 0;
    for (int64_t i = 0; i < size; i++) total += growth.sum[i] * memory[i];
    return total;
  }

  // Pairs of the chunk, of the lower triangles g Q K^T, with decay, and dR (w v)^T, which gets it here.
  void meet(const float *capacity, float *agreement, const float *within, int tokens) {
    Vector of_sinks[CHUNK], of_sources[CHUNK / LANES];
    for (Vector &total : of_sinks) total = Vector{};
    for (Vector &total : of_sources) total = Vector{};
    for (int i = 0; i < tokens; i++)
      for (int column = 0; column <= i; column += LANES) {
        const int at = i * CHUNK + column;
        const auto earlier = lane_numbers() + (float)column < (float)i;
        const Vector pairs = earlier ? load(capacity + at) * load(agreement + at) : Vector{};
        of_sinks[i] += pairs, of_sources[column / LANES] += pairs;
        store(agreement + at, load(agreement + at) * load(within + at));
      }
    for (int t = 0; t < CHUNK; t += LANES) store(nearby + t, sums(of_sinks + t) - of_sources[t / LANES]);
  }

  // Into the records, with the gates of sinks, and sums by lanes of the pairs of each source with sinks after the
  // chunk.
  void finish(int64_t at, int tokens, const float *gate, Vector *left, Records &records) {
    float of_sources[CHUNK];
    for (int t = 0; t < CHUNK; t += LANES) store(of_sources + t, sums(left + t));
    for (int t = tokens - 1; t >= 0; t--) {
      later += (double)gate[t] * records.arrived[at + t] - of_sources[t] + nearby[t];
      records.grad_decay[at + t] = (float)later;
      records.grad_count[at + t] = 0.f;
    }
  }
};

// Of all tokens of a sequence and head, what the counts add; and out. `of_count` is wanted of the last count. Returns
// what is wanted of the count before the first token. Values above 0 count as 0, and get 0.
inline double write_decay_gradient(const Rows<const float> &log_decay, const Rows<float> &out, int64_t tokens,
                                   double of_count, const Records &records) {
  const bool constant = log_decay.stride == 0;
  const double of_all = constant ? decay_of(*log_decay.first) : 0.;
  for (int64_t t = tokens - 1; t >= 0; t--) {
    const float given = *log_decay.at(t);
    of_count += records.grad_count[t];
    *out.at(t) = given > 0 ? 0.f : (float)(records.grad_decay[t] + of_count * records.past_count[t]);
    of_count *= constant ? of_all : decay_of(given);
  }
  return of_count;
}

}  // namespace
