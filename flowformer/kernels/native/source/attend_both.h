// Linear attention of features where every sink sees every source alike: one pass over the tokens of each side, and in
// the backward pass one more over sources. The letters are those of attend.h and attend_backward.h.
#pragma once

#include "attend_backward.h"

namespace {

template <class T>
struct AttendBoth : AttendBackward<T> {
  using Base = AttendBackward<T>;
  using Base::attend, Base::call, Base::keys, Base::values, Base::Q, Base::K, Base::V, Base::gate, Base::sums_before;
  using Base::upstream, Base::weighted, Base::gated, Base::grad_Q, Base::grad_K;
  // The tokens of both sides of one head.
  struct Sides {
    typename Base::Tensors to;
    Rows<const T> k, v;
    Rows<T> out, grad_v;
    Rows<float> grad_k, grad_weight, grad_scale;
    TokenFactors factors;
    int64_t sinks, sources;

    Sides(const AttendCall &attend, int64_t s, int64_t h)
        : to(attend.flow, s, h),
          k(rows_of<const T>(attend.flow.k, attend.flow.sources, s, h)),
          v(rows_of<const T>(attend.flow.v, attend.flow.sources, s, h)),
          out(rows_of<T>(attend.flow.out, attend.flow.sinks, s, h)),
          grad_v(rows_of<T>(attend.flow.grad_v, attend.flow.sources, s, h)),
          grad_k(rows_of<float>(attend.flow.grad_k, attend.flow.sources, s, h)),
          grad_weight(rows_of<float>(attend.grad_weight, attend.flow.sources, s, h)),
          grad_scale(rows_of<float>(attend.grad_scale, attend.flow.sinks, s, h)),
          factors(attend, s, h),
          sinks(attend.flow.sinks.rows[3 * s + 2]),
          sources(attend.flow.sources.rows[3 * s + 2]) {}
  };

  AttendBoth(const AttendCall &attend, Scratch &scratch, bool backward)
      : Base(attend, 0, backward && attend.divides, scratch) {}

  // body(first token, tokens) for every chunk.
  template <class Body>
  static void each_chunk(int64_t length, Body body) {
    for (int64_t at = 0; at < length; at += CHUNK) body(at, (int)(length - at < CHUNK ? length - at : CHUNK));
  }

  // Features of one side; zero where no token is.
  void load_side(const Rows<const T> &from, int64_t at, int tokens, int64_t end, float *out) {
    for (int t = 0; t < tokens; t++) {
      fetch<0>(from, at + t + AHEAD, end, call.key_channels);
      for (int x = 0; x < keys; x += LANES) {
        const Vector given = load_part(from.at(at + t), call.key_channels, x);
        store(out + t * keys + x, feature(given, call.feature_map) * load(this->real + x));
      }
    }
    memset(out + tokens * keys, 0, sizeof(float) * (CHUNK - tokens) * keys);
  }

  void load_keys(const Sides &sides, int64_t at, int tokens) {
    load_side(sides.k, at, tokens, sides.sources, K);
    sides.factors.weigh(K, keys, at, tokens);
  }

  // body(tile, row, column) for the tiles of rows (CHUNK, inner) times a matrix (inner, columns) in strips.
  template <class Body>
  static void multiply_rows(const float *rows, int inner, const float *matrix, int columns, int tokens, Body body) {
    each_strip(columns, [&](auto width, int column) {
      for (int i = 0; i < tokens; i += ROWS) {
        Tile<width> tile;
        tile.add(rows + i * inner, inner, 1, matrix + column * inner, 0, inner);
        body(tile, i, column);
      }
    });
  }

  // ---------------------------------------------------------------------------------------------------------- forward

  // `matrix` and `sums` take M and S.
  void forward(const Sides &sides, Memory &memory, double *matrix, double *sums) {
    for (int t = 0; t < CHUNK; t++) this->weight[t] = 1.f;
    memory.start_from_zero(matrix);
    memset(sums, 0, sizeof(double) * keys);
    each_chunk(sides.sources, [&](int64_t at, int tokens) {
      load_keys(sides, at, tokens);
      this->load_values(sides.v, at, tokens, this->weight);
      memory.add(K, V, tokens);
      for (int x = 0; attend.divides && x < keys; x += LANES) {
        Vector added{};
        for (int t = 0; t < tokens; t++) added += load(K + t * keys + x);
        for (int i = 0; i < LANES; i++) sums[x + i] += added[i];
      }
    });
    memory.flush();
    for (int x = 0; x < keys; x++) sums_before[x] = (float)sums[x];
    each_chunk(sides.sinks, [&](int64_t at, int tokens) {
      load_side(sides.to.q, at, tokens, sides.sinks, Q);
      find_gates(sides, at, tokens);
      multiply_rows(Q, keys, memory.now, this->values, tokens, [&](const auto &tile, int i, int column) {
        for (int r = 0; r < ROWS && i + r < tokens; r++)
          for (int m = 0; m < (int)(sizeof(tile.sum[0]) / sizeof(Vector)); m++)
            store_part(sides.out.at(at + i + r), call.value_channels, column + m * LANES, tile.sum[r][m] * gate[i + r]);
      });
    });
  }

  // gate = a / (T + eps), and 1 / (T + eps), or 1, in inverse_in.
  void find_gates(const Sides &sides, int64_t at, int tokens) {
    for (int t = 0; t < CHUNK; t++) gate[t] = t < tokens ? sides.factors.scale_at(at + t) : 0.f;
    for (int first = 0; first < tokens; first += LANES) {
      Vector total[LANES];
      for (int t = 0; t < LANES; t++) {
        total[t] = Vector{};
        for (int x = 0; attend.divides && x < keys; x += LANES)
          total[t] += load(Q + (first + t) * keys + x) * load(sums_before + x);
      }
      const Vector inverse = attend.divides ? 1.f / (sums(total) + (float)call.eps) : all(1.f);
      store(this->inverse_in + first, inverse), store(gate + first, load(gate + first) * inverse);
    }
    for (int t = tokens; t < CHUNK; t++) gate[t] = 0.f;  // 0 / eps may be no number
  }

  // --------------------------------------------------------------------------------------------------------- backward

  // The memory is (values, keys), the growth (keys, values), both with the channel of ones.
  void backward(const Sides &sides, Memory &memory, double *matrix, Memory &growth, double *growth_sum) {
    memory.across = true;
    memory.start_from_zero(matrix), growth.start_from_zero(growth_sum);
    each_chunk(sides.sources, [&](int64_t at, int tokens) {
      load_keys(sides, at, tokens);
      this->load_sources(sides.v, at, tokens);
      to_strips(K, CHUNK, keys, this->key_strips);
      memory.add(weighted, this->key_strips, tokens);
    });
    memory.flush();
    if (attend.divides) this->read_sums(memory);
    each_chunk(sides.sinks, [&](int64_t at, int tokens) { sinks_backward(sides, at, tokens, memory, growth); });
    growth.flush();
    this->transpose_growth(growth);
    each_chunk(sides.sources, [&](int64_t at, int tokens) { sources_backward(sides, at, tokens, growth); });
  }

  void sinks_backward(const Sides &sides, int64_t at, int tokens, const Memory &memory, Memory &growth) {
    load_side(sides.to.q, at, tokens, sides.sinks, Q);
    find_gates(sides, at, tokens);
    this->load_rows(sides.to.grad_out, at, tokens, nullptr, upstream);
    multiply_rows(upstream, values, memory.now, keys, tokens,
                  [&](const auto &tile, int i, int column) { this->put(tile, grad_Q + i * keys + column, keys); });
    for (int t = 0; t < CHUNK; t++) {
      Vector dot{};
      for (int x = 0; x < keys; x += LANES) {
        const Vector Q_t = load(Q + t * keys + x);
        if (t < tokens) dot += load(grad_Q + t * keys + x) * Q_t;
        store(gated + t * keys + x, Q_t * gate[t]);
      }
      if (t >= tokens) continue;
      const float of_scale = sum(dot) * this->inverse_in[t], u = attend.divides ? -of_scale : 0.f;
      if (sides.grad_scale.first) *sides.grad_scale.at(at + t) = of_scale;
      if (attend.divides) upstream[t * values + call.value_channels] = u;
      for (int x = 0; x < keys; x += LANES) {
        Vector of_Q = load(grad_Q + t * keys + x);
        if (attend.divides) of_Q += load(sums_before + x) * u;
        const Vector slope = this->slope(sides.to.q.at(at + t), x, load(Q + t * keys + x));
        store_part(sides.to.grad_q.at(at + t), call.key_channels, x, of_Q * slope * gate[t]);
      }
    }
    to_strips(upstream, CHUNK, values, this->upstream_strips);
    growth.add(gated, this->upstream_strips, tokens);
  }

  void sources_backward(const Sides &sides, int64_t at, int tokens, const Memory &growth) {
    load_keys(sides, at, tokens);
    this->load_sources(sides.v, at, tokens);
    multiply_rows(weighted, values, this->transposed, keys, tokens,
                  [&](const auto &tile, int i, int column) { this->put(tile, grad_K + i * keys + column, keys); });
    multiply_rows(K, keys, growth.now, values, tokens, [&](const auto &tile, int i, int column) {
      for (int r = 0; r < ROWS && i + r < tokens; r++)
        for (int m = 0; m < (int)(sizeof(tile.sum[0]) / sizeof(Vector)); m++)
          store_part(sides.grad_v.at(at + i + r), call.value_channels, column + m * LANES, tile.sum[r][m]);
    });
    if (sides.factors.weight.first) this->unweigh(sides.k, sides.factors, sides.grad_weight, at, tokens);
    for (int t = 0; t < tokens; t++)
      for (int x = 0; x < keys; x += LANES) {
        const Vector slope = this->slope(sides.k.at(at + t), x, load(K + t * keys + x));
        store_part(sides.grad_k.at(at + t), call.key_channels, x, load(grad_K + t * keys + x) * slope);
      }
  }
};

}  // namespace
