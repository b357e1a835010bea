// Sinks and sources that see each other whole, forward and backward: passes over the tokens of each side, with a few
// sums between them. The mathematics is in flowformer/ops/flow.py; the derivatives, written d x, are
//
//   R_i = g_i Q_i M, M = sum K_j^T w_j v_j    G = sum g_i Q_i^T dR_i    P_i = M dR_i    d g_i = Q_i . P_i    d Q_i =
//   g_i P_i d (w_j v_j) = K_j G    d w_j = v_j . d (w_j v_j)    d K_j = G w_j v_j    d O^_j = w_j (d w_j - <G, M> / S)
//   X = sum d I^_i (Q_i + e)    d K_j = X / O_j    d O_j = - K_j . X / O_j^2    W = sum d O_j (K_j + e)    d Q_i = W
//   Y = sum d O^_j (K_j + e)    d Q_i = Y / I_i    d I_i = - Q_i . Y / I_i^2    Z = sum d I_i (Q_i + e)    d K_j = Z
//
// besides what each flow gives its own token.
#pragma once

#include "flows.h"
#include "parallel.h"

namespace {

// Passes, forward and backward. Each gathers sums that those after it want of all tokens.
enum Pass { SUMS, SCALED, CONSERVED, AGGREGATE, SINKS, GRAD_SINKS, GRAD_VALUES, GRAD_SOURCES, GRAD_Q, GRAD_K };

// Sums over all tokens of a sequence and head.
enum Sum { SUM_K, SUM_Q, SUM_K_SCALED, SUM_Q_SCALED, SUM_X, SUM_Y, SUM_Z, SUM_W, SUM_COUNT };

// The tokens that a task has in hand.
struct Range {
  int64_t sinks_first, sinks_last, sources_first, sources_last;
};

// What one task gathers in one pass.
struct Part {
  double *sums[SUM_COUNT];
  double largest, total;  // of the competition, as in Past
  Memory memory;          // sum K^T v exp(O^ - largest), or G
  double *matrix;

  Part(const FlowCall &call, int keys, int values, Scratch &scratch)
      : memory(call.key_channels, call.value_channels, keys, values, scratch) {
    for (double *&sum : sums) sum = scratch.take<double>(keys);
    matrix = scratch.take<double>(call.key_channels * call.value_channels);
  }

  void clear(int keys) {
    for (double *sum : sums) memset(sum, 0, sizeof(double) * keys);
    largest = LOG_ZERO, total = 0.;
    memory.start_from_zero(matrix);
  }
};

// What all tokens of a sequence and head have in common.
struct Totals {
  static constexpr int64_t KEPT = 1 << 20;  // features of a head
  double *sums[SUM_COUNT];
  float *with_eps[SUM_COUNT];  // as floats
  double largest, total;
  double *aggregate, *growth;          // M over its normaliser, and G
  float *M, *M_across, *G, *G_across;  // (keys, values), or (values, keys), in strips
  double agreement;                    // <G, M>
  float *Q, *K;                        // features of all tokens, where they are kept; else null
  float *inverse_in, *inverse_out;     // one for each token
  float *weight, *grad_flow, *inside, *grad_incoming;

  Totals(const FlowCall &call, int keys, int values, int64_t sinks, int64_t sources, bool backward, Scratch &scratch) {
    for (double *&sum : sums) sum = scratch.take<double>(keys);
    for (float *&sum : with_eps) sum = scratch.take<float>(keys);
    aggregate = scratch.take<double>(call.key_channels * call.value_channels);
    growth = scratch.take<double>(call.key_channels * call.value_channels);
    for (float **matrix : {&M, &M_across, &G, &G_across}) *matrix = scratch.take<float>(keys * values);
    inverse_in = scratch.take<float>(sinks + CHUNK), inverse_out = scratch.take<float>(sources + CHUNK);
    weight = scratch.take<float>(sources + CHUNK);
    // Kept, they are computed once and not in every pass; but long sequences would fill the memory.
    const bool kept = (sinks + sources) * keys <= KEPT;
    Q = kept ? scratch.take<float>((sinks + CHUNK) * keys) : nullptr;
    K = kept ? scratch.take<float>((sources + CHUNK) * keys) : nullptr;
    if (!backward) return;
    grad_flow = scratch.take<float>(sources + CHUNK), inside = scratch.take<float>(sources + CHUNK);
    grad_incoming = scratch.take<float>(sinks + CHUNK);
  }
};

template <class T>
struct Bidirectional {
  const FlowCall &call;
  const int keys, values;
  float *eps, *real;
  float *X;                      // features of the chunk in hand (CHUNK, keys): kept ones, or
  float *own;                    // computed here
  float *rows, *strips;          // values, or upstream, (CHUNK, values)
  float *scaled;                 // features times a factor (CHUNK, keys)
  float *grad;                   // (CHUNK, keys)
  float *flow, *factor, *other;  // (CHUNK)

  Bidirectional(const FlowCall &call, Scratch &scratch)
      : call(call), keys(padded(call.key_channels)), values(padded(call.value_channels)) {
    eps = scratch.take<float>(keys), real = scratch.take<float>(keys);
    own = scratch.take<float>(CHUNK * keys), scaled = scratch.take<float>(CHUNK * keys);
    grad = scratch.take<float>(CHUNK * keys);
    rows = scratch.take<float>(CHUNK * values), strips = scratch.take<float>(CHUNK * values);
    flow = scratch.take<float>(CHUNK), factor = scratch.take<float>(CHUNK), other = scratch.take<float>(CHUNK);
  }

  void prepare() {
    for (int x = 0; x < keys; x++) real[x] = x < call.key_channels, eps[x] = real[x] ? (float)call.eps : 0.f;
  }

  // ------------------------------------------------------------------------------------------------- a chunk of one
  // side

  // X = phi of tokens [at, at + tokens); zero beyond. `kept` has them after the first pass.
  void load_features(const Rows<const T> &from, float *kept, int64_t at, int tokens, int64_t end, bool first = false) {
    X = kept ? kept + at * keys : own;
    if (kept && !first) return;
    for (int t = 0; t < tokens; t++) {
      const T *row = from.at(at + t);
      // Where tokens lie apart, the machine does not foresee the next row.
      fetch<0>(from, at + t + AHEAD, end, call.key_channels);
      for (int x = 0; x < keys; x += LANES)
        store(X + t * keys + x, feature(load_part(row, call.key_channels, x), call.feature_map) * load(real + x));
    }
    memset(X + tokens * keys, 0, sizeof(float) * (CHUNK - tokens) * keys);
  }

  void load_rows(const Rows<const T> &from, int64_t at, int tokens, int64_t end, const float *factors) {
    for (int t = 0; t < CHUNK; t++) {
      fetch<0>(from, at + t + CHUNK, end, call.value_channels);
      for (int x = 0; x < values; x += LANES) {
        Vector row = t < tokens ? load_part(from.at(at + t), call.value_channels, x) : Vector{};
        if (factors && t < tokens) row *= factors[t];
        store(rows + t * values + x, row);
      }
    }
  }

  // out_t = (X_t + e) . vector, zero where no token is; with `small` null, X_t . vector
  void dot(const float *vector, const float *small, int tokens, float *out) {
    for (int first = 0; first < tokens; first += LANES) {
      Vector total[LANES];
      for (Vector &one : total) one = Vector{};
      for (int x = 0; x < keys; x += LANES) {
        const Vector other = load(vector + x), e = small ? load(small + x) : Vector{};
        for (int t = 0; t < LANES; t++) total[t] += (load(X + (first + t) * keys + x) + e) * other;
      }
      store(out + first, sums(total));
    }
  }

  // sum += factor_t (X_t + e), or sum of X_t without factors
  void gather(double *sum, const float *factors, const float *small, int tokens) {
    for (int x = 0; x < keys; x += LANES) {
      Vector total = Vector{};
      const Vector e = small ? load(small + x) : Vector{};
      for (int t = 0; t < tokens; t++) {
        const Vector one = load(X + t * keys + x) + e;
        total += factors ? one * factors[t] : one;
      }
      for (int i = 0; i < LANES; i++) sum[x + i] += total[i];
    }
  }

  template <class Body>
  void each_chunk(int64_t first, int64_t last, Body body) {
    for (int64_t at = first; at < last; at += CHUNK) body(at, (int)(last - at < CHUNK ? last - at : CHUNK));
  }

  // -------------------------------------------------------------------------------------------------------------
  // forward

  void sum_features(const Rows<const T> &from, float *kept, int64_t first, int64_t last, double *sum) {
    each_chunk(first, last, [&](int64_t at, int tokens) {
      load_features(from, kept, at, tokens, last, true);
      gather(sum, nullptr, nullptr, tokens);
    });
  }

  // 1 / flow of one side, kept; and the sum of its features over their flows.
  void scale_features(const Rows<const T> &from, float *kept, int64_t first, int64_t last, const float *others,
                      float *inverse, double *sum) {
    each_chunk(first, last, [&](int64_t at, int tokens) {
      load_features(from, kept, at, tokens, last);
      dot(others, eps, tokens, flow);
      for (int t = 0; t < tokens; t++) inverse[at + t] = 1.f / (flow[t] + (float)call.flow_eps);
      gather(sum, inverse + at, nullptr, tokens);
    });
  }

  // O^, clamped, as the first part of the weights.
  void conserve(const Rows<const T> &k, int64_t at, int tokens, int64_t last, Totals &totals, float ratio,
                bool backward) {
    load_features(k, totals.K, at, tokens, last);
    dot(totals.with_eps[SUM_Q_SCALED], eps, tokens, flow);
    for (int t = 0; t < tokens; t += LANES) {
      const Vector free = (load(flow + t) + (float)call.flow_eps) * ratio;
      const Vector bound = call.clamp < 0 ? free : min(max(free, all((float)-call.clamp)), all((float)call.clamp));
      store(flow + t, bound);
      const Vector inside = bound == free ? all(1.f) : Vector{};
      if (backward)
        for (int i = 0; i < LANES && t + i < tokens; i++) totals.inside[at + t + i] = inside[i];
    }
    for (int t = 0; t < tokens; t++) totals.weight[at + t] = flow[t];
  }

  // exp(O^ - largest), the sum of them, and of K^T v times them. A larger O^ than all before rescales what was
  // gathered.
  void compete(int64_t at, int tokens, Totals &totals, Part &part) {
    double largest = part.largest;
    for (int t = 0; t < tokens; t++) largest = totals.weight[at + t] > largest ? totals.weight[at + t] : largest;
    if (largest > part.largest) {
      const double kept = std::exp(part.largest - largest);
      part.total *= kept, part.largest = largest;
      part.memory.scale(kept);
    }
    for (int t = 0; t < CHUNK; t++) factor[t] = t < tokens ? (float)(totals.weight[at + t] - largest) : 0.f;
    for (int t = 0; t < tokens; t += LANES) store(factor + t, exp(load(factor + t)));
    float sum = 0;
    for (int t = 0; t < tokens; t++) sum += factor[t];
    part.total += sum;
  }

  void aggregate(const Rows<const T> &k, const Rows<const T> &v, const Range &range, Totals &totals, Part &part,
                 float ratio, bool backward) {
    each_chunk(range.sources_first, range.sources_last, [&](int64_t at, int tokens) {
      if (call.competition == SEQUENCE)
        conserve(k, at, tokens, range.sources_last, totals, ratio, backward);
      else
        load_features(k, totals.K, at, tokens, range.sources_last);
      if (call.competition == SEQUENCE) compete(at, tokens, totals, part);
      if (call.competition == NONE)
        for (int t = 0; t < tokens; t++) totals.weight[at + t] = 1.f;
      load_rows(v, at, tokens, range.sources_last, call.competition == SEQUENCE ? factor : totals.weight + at);
      to_strips(rows, CHUNK, values, strips);
      part.memory.add(X, strips, tokens);
    });
  }

  // g_i to factor, I^_i's part of it to flow.
  void gate(int64_t at, int tokens, const Totals &totals, float ratio) {
    dot(totals.with_eps[SUM_K_SCALED], eps, tokens, flow);
    for (int t = 0; t < tokens; t += LANES)
      store(flow + t, call.allocation ? sigmoid((load(flow + t) + (float)call.flow_eps) * ratio) : all(1.f));
    for (int t = 0; t < CHUNK; t++) factor[t] = t < tokens ? flow[t] * totals.inverse_in[at + t] : 0.f;
  }

  void put_out(const Rows<const T> &q, const Rows<T> &out, const Range &range, const Totals &totals, float ratio) {
    each_chunk(range.sinks_first, range.sinks_last, [&](int64_t at, int tokens) {
      load_features(q, totals.Q, at, tokens, range.sinks_last);
      gate(at, tokens, totals, ratio);
      each_strip(values, [&](auto width, int column) {
        for (int i = 0; i < tokens; i += ROWS) {
          if (!column)
            for (int r = 0; r < ROWS; r++) fetch<1>(out, at + i + r + CHUNK, range.sinks_last, call.value_channels);
          Tile<width> tile;
          tile.add(X + i * keys, keys, 1, totals.M + column * keys, 0, keys);
          for (int r = 0; r < ROWS && i + r < tokens; r++)
            for (int m = 0; m < width; m++)
              store_part(out.at(at + i + r), call.value_channels, column + m * LANES, tile.sum[r][m] * factor[i + r]);
        }
      });
    });
  }

  // ------------------------------------------------------------------------------------------------------------
  // backward

  // grad += matrix product of (CHUNK, values) rows with a (values, keys) matrix in strips
  void project(const float *matrix, int tokens) {
    each_strip(keys, [&](auto width, int column) {
      for (int i = 0; i < tokens; i += ROWS) {
        Tile<width> tile;
        tile.add(rows + i * values, values, 1, matrix + column * values, 0, values);
        for (int r = 0; r < ROWS; r++)
          for (int m = 0; m < width; m++) store(grad + (i + r) * keys + column + m * LANES, tile.sum[r][m]);
      }
    });
  }

  void read_grad(const Rows<float> &from, int64_t at, int tokens) {
    for (int t = 0; t < CHUNK; t++)
      for (int x = 0; x < keys; x += LANES)
        store(grad + t * keys + x, t < tokens ? load_part(from.at(at + t), call.key_channels, x) : Vector{});
  }

  void write_grad(const Rows<float> &to, int64_t at, int tokens) {
    for (int t = 0; t < tokens; t++)
      for (int x = 0; x < keys; x += LANES) store_part(to.at(at + t), call.key_channels, x, load(grad + t * keys + x));
  }

  void write_input_grad(const Rows<const T> &inputs, const Rows<float> &to, int64_t at, int tokens) {
    for (int t = 0; t < tokens; t++)
      for (int x = 0; x < keys; x += LANES) {
        const Vector phi = load(X + t * keys + x);
        const Vector input = call.feature_map ? load_part(inputs.at(at + t), call.key_channels, x) : phi;
        store_part(to.at(at + t), call.key_channels, x,
                   load(grad + t * keys + x) * feature_slope(input, phi, call.feature_map));
      }
  }

  // grad_t += factor_t vector, and vector alone without factors
  void spread(const float *factors, const float *vector, int tokens) {
    for (int x = 0; x < keys; x += LANES) {
      const Vector one = load(vector + x);
      for (int t = 0; t < tokens; t++) {
        const Vector before = load(grad + t * keys + x);
        store(grad + t * keys + x, before + (factors ? one * factors[t] : one));
      }
    }
  }

  void grad_sinks(const Rows<const T> &q, const Rows<const T> &upstream, const Rows<float> &grad_q, const Range &range,
                  Totals &totals, Part &part, float ratio) {
    each_chunk(range.sinks_first, range.sinks_last, [&](int64_t at, int tokens) {
      load_features(q, totals.Q, at, tokens, range.sinks_last);
      gate(at, tokens, totals, ratio);
      load_rows(upstream, at, tokens, range.sinks_last, nullptr);
      to_strips(rows, CHUNK, values, strips);
      project(totals.M_across, tokens);
      Vector of_gate[CHUNK];
      for (int t = 0; t < CHUNK; t++) {
        of_gate[t] = Vector{};
        for (int x = 0; x < keys; x += LANES) {
          const int here = t * keys + x;
          store(scaled + here, load(X + here) * factor[t]);
          if (t >= tokens) continue;
          of_gate[t] += load(X + here) * load(grad + here);
          store(grad + here, load(grad + here) * factor[t]);
        }
      }
      for (int t = 0; t < tokens; t += LANES) store(other + t, sums(of_gate + t));
      for (int t = 0; t < tokens; t++) {
        const float allocation = flow[t], inverse = totals.inverse_in[at + t];
        totals.grad_incoming[at + t] = -other[t] * allocation * inverse * inverse;
        other[t] = call.allocation ? other[t] * inverse * allocation * (1.f - allocation) * ratio : 0.f;
      }
      spread(other, totals.with_eps[SUM_K_SCALED], tokens);
      gather(part.sums[SUM_X], other, eps, tokens);
      write_grad(grad_q, at, tokens);
      part.memory.add(scaled, strips, tokens);
    });
  }

  // d v, d w, and the products' part of d K.
  void grad_values(const Rows<const T> &k, const Rows<const T> &v, const Rows<T> &grad_v, const Rows<float> &grad_k,
                   const Range &range, Totals &totals) {
    each_chunk(range.sources_first, range.sources_last, [&](int64_t at, int tokens) {
      load_features(k, totals.K, at, tokens, range.sources_last);
      load_rows(v, at, tokens, range.sources_last, totals.weight + at);
      project(totals.G_across, tokens);
      write_grad(grad_k, at, tokens);
      Vector of_weight[CHUNK];
      for (Vector &one : of_weight) one = Vector{};
      each_strip(values, [&](auto width, int column) {
        for (int j = 0; j < tokens; j += ROWS) {
          Tile<width> tile;
          tile.add(X + j * keys, keys, 1, totals.G + column * keys, 0, keys);
          for (int r = 0; r < ROWS && j + r < tokens; r++)
            for (int m = 0; m < width; m++) {
              const int x = column + m * LANES;
              of_weight[j + r] += tile.sum[r][m] * load_part(v.at(at + j + r), call.value_channels, x);
              store_part(grad_v.at(at + j + r), call.value_channels, x, tile.sum[r][m] * totals.weight[at + j + r]);
            }
        }
      });
      for (int t = 0; t < tokens; t += LANES) store(other + t, sums(of_weight + t));
      for (int t = 0; t < tokens; t++)
        totals.grad_flow[at + t] =
            call.competition != SEQUENCE ? other[t] : totals.weight[at + t] * (other[t] - (float)totals.agreement);
    });
  }

  void grad_sources(const Rows<const T> &k, const Rows<float> &grad_k, const Range &range, Totals &totals, Part &part,
                    float ratio) {
    each_chunk(range.sources_first, range.sources_last, [&](int64_t at, int tokens) {
      load_features(k, totals.K, at, tokens, range.sources_last);
      read_grad(grad_k, at, tokens);
      const float *inverse = totals.inverse_out + at;
      if (call.competition != NONE) {
        for (int t = 0; t < tokens; t++) factor[t] = totals.grad_flow[at + t] * totals.inside[at + t] * ratio;
        gather(part.sums[SUM_Y], factor, eps, tokens);
        spread(factor, totals.with_eps[SUM_Q_SCALED], tokens);
      }
      spread(inverse, totals.with_eps[SUM_X], tokens);
      dot(totals.with_eps[SUM_X], nullptr, tokens, flow);
      for (int t = 0; t < tokens; t++) flow[t] *= -inverse[t] * inverse[t];
      gather(part.sums[SUM_W], flow, eps, tokens);
      spread(flow, totals.with_eps[SUM_Q], tokens);
      write_grad(grad_k, at, tokens);
    });
  }

  void finish_sinks(const Rows<const T> &q, const Rows<float> &grad_q, const Range &range, Totals &totals, Part &part) {
    each_chunk(range.sinks_first, range.sinks_last, [&](int64_t at, int tokens) {
      load_features(q, totals.Q, at, tokens, range.sinks_last);
      read_grad(grad_q, at, tokens);
      const float *inverse = totals.inverse_in + at;
      dot(totals.with_eps[SUM_Y], nullptr, tokens, flow);
      for (int t = 0; t < tokens; t++) flow[t] = totals.grad_incoming[at + t] - flow[t] * inverse[t] * inverse[t];
      spread(inverse, totals.with_eps[SUM_Y], tokens);
      spread(nullptr, totals.with_eps[SUM_W], tokens);
      spread(flow, totals.with_eps[SUM_K], tokens);
      gather(part.sums[SUM_Z], flow, eps, tokens);
      write_input_grad(q, grad_q, at, tokens);
    });
  }

  void finish_sources(const Rows<const T> &k, const Rows<float> &grad_k, const Range &range, const Totals &totals) {
    each_chunk(range.sources_first, range.sources_last, [&](int64_t at, int tokens) {
      load_features(k, totals.K, at, tokens, range.sources_last);
      read_grad(grad_k, at, tokens);
      spread(nullptr, totals.with_eps[SUM_Z], tokens);
      write_input_grad(k, grad_k, at, tokens);
    });
  }
};

}  // namespace
