// The causal form, forward: one pass over chunks of tokens.
#pragma once

#include "flows.h"
#include "parallel.h"

namespace {

template <class T, int KEYS>
struct Causal : Flows<T, KEYS> {
  using Base = Flows<T, KEYS>;
  using Base::call, Base::keys, Base::past, Base::Q, Base::K, Base::decay, Base::decays;
  const int64_t columns;  // of the memory: value channels, and further ones of a caller
  const int values;       // columns, padded
  float *K_by_channel;    // (keys, CHUNK) in strips
  float *V;               // values times their weights (CHUNK, values) in strips
  float *capacity;        // Q K^T, lower triangle (CHUNK, CHUNK)
  float *gate;            // allocation / I

  Causal(const FlowCall &call, Scratch &scratch, int64_t further = 0)
      : Base(call, scratch), columns(call.value_channels + further), values(padded(columns)) {
    K_by_channel = scratch.take<float>(keys * CHUNK);
    V = scratch.take<float>(CHUNK * values);
    capacity = scratch.take<float>(CHUNK * CHUNK);
    gate = scratch.take<float>(CHUNK);
  }

  // Values of the chunk, each times its weight; zero where no token is.
  void load_values(const Rows<const T> &v, int64_t first, int tokens, const float *weight) {
    each_strip(values, [&](auto width, int column) {
      for (int t = 0; t < CHUNK; t++)
        for (int m = 0; m < width; m++) {
          const int at = column + m * LANES;
          const Vector value = t < tokens ? load_part(v.at(first + t), call.value_channels, at) * weight[t] : Vector{};
          store(V + column * CHUNK + (t * width + m) * LANES, value);
        }
    });
  }

  // Where the tensors have the tokens of one head.
  struct Place {
    Rows<const T> q, k, v;
    Rows<const float> log_decay;
    Rows<T> out;
    int64_t at, last;  // the chunk's first token, and where the sequence, or the piece of it, ends

    Place(const FlowCall &call, int64_t sequence, int64_t head, int64_t at, int64_t last)
        : q(rows_of<const T>(call.q, call.sinks, sequence, head)),
          k(rows_of<const T>(call.k, call.sinks, sequence, head)),
          v(rows_of<const T>(call.v, call.sinks, sequence, head)),
          log_decay(rows_of<const float>(call.log_decay, call.sinks, sequence, head)),
          out(rows_of<T>(call.out, call.sinks, sequence, head)),
          at(at),
          last(last) {}
  };

  // Values times factors of their tokens, such as the decay up to where the memory takes them in.
  void scale_values(const float *factors) {
    each_strip(values, [&](auto width, int column) {
      for (int t = 0; t < CHUNK; t++)
        for (int m = 0; m < width; m++) {
          float *part = V + column * CHUNK + (t * width + m) * LANES;
          store(part, load(part) * factors[t]);
        }
    });
  }

  // (Q memory + capacity V) gate. Meanwhile the next chunk is fetched: spread over the products, fetching keeps pace
  // with them; all at once it would wait for memory.
  void output(const Memory &memory, const Rows<T> &out, int64_t first, int tokens, const Place &next) {
    const int strips = (values + STRIP - 1) / STRIP, each = (ROWS + strips - 1) / strips;
    each_strip(values, [&](auto width, int column) {
      for (int i = 0; i < tokens; i += ROWS) {
        for (int t = 0; t < each; t++) {
          const int64_t token = next.at + i + column / STRIP * each + t;
          fetch<0>(next.q, token, next.last, call.key_channels), fetch<0>(next.k, token, next.last, call.key_channels);
          fetch<0>(next.v, token, next.last, call.value_channels);
        }
        Tile<width> tile;
        tile.add(Q + i * keys, keys, 1, memory.now + column * keys, 0, keys);
        if (decays) tile.scale(decay.arriving + i);
        tile.add(capacity + i * CHUNK, CHUNK, 1, V + column * CHUNK, 0, i + ROWS < tokens ? i + ROWS : tokens);
        for (int r = 0; r < ROWS && i + r < tokens; r++)
          for (int m = 0; m < width; m++)
            store_part(out.at(first + i + r), call.value_channels, column + m * LANES, tile.sum[r][m] * gate[i + r]);
      }
    });
  }

  void allocate_flow(int tokens) {
    for (int t = 0; t < tokens; t += LANES) {
      const Vector inverse = load(this->inverse_in + t);
      store(gate + t, call.allocation ? inverse * sigmoid(load(this->conserved_in + t)) : inverse);
    }
  }

  // A chunk of one head, up to a stage. For competition over heads, `flows` (one for each token) takes O^ in stage
  // COMPETITION and holds the weights later. `next` is the chunk that is wanted after this one.
  void chunk(const Place &place, const Place &next, Stage stage, Memory &memory, float *flows) {
    const int64_t at = place.at;
    const int tokens = (int)(place.last - at < CHUNK ? place.last - at : CHUNK);
    this->load_features(place.q, place.k, at, tokens);
    if (decays) decay.load(place.log_decay, at, tokens);
    this->open_chunk(tokens);
    if (!this->flows_of_chunk(tokens, stage, flows ? flows + at : nullptr)) return;
    load_values(place.v, at, tokens, this->weight);
    if (stage == OUTPUT) {
      allocate_flow(tokens);
      by_channel(K, keys, K_by_channel);
      if (decays) decay.fill_within();
      lower_product(Q, K_by_channel, keys, tokens, decays ? decay.within : nullptr, capacity);
      output(memory, place.out, at, tokens, next);
    }
    if (decays) scale_values(decay.leaving);
    memory.add(K, V, tokens, decay.whole);
  }
};

}  // namespace
