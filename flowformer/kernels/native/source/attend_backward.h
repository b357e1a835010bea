// Linear attention of features, the causal form, backward. In causal_backward.h's words the gates are g_t = a_t / (T_t
// + eps), and T is one more channel of the memory: that of values 1, whose derivative is
//
//   d T_t = g_t u_t, u_t = - d g_t / (T_t + eps)
//
// So with u as one more channel of dR, and with 1 as one more of v, the products give all of d Q and d K.
#pragma once

#include "attend.h"
#include "causal_backward.h"

namespace {

template <class T>
struct AttendBackward : CausalBackward<T, 0> {
  using Base = CausalBackward<T, 0>;
  using Base::call, Base::keys, Base::values, Base::Q, Base::K, Base::decay, Base::decays, Base::gate;
  using Base::upstream, Base::weighted, Base::gated, Base::grad_Q, Base::grad_K;
  const AttendCall &attend;
  float *of_total;     // u of all tokens
  float *sums_before;  // S before the chunk

  // `further`: whether there is the channel of ones.
  AttendBackward(const AttendCall &attend, int64_t tokens, bool further, Scratch &scratch)
      : Base(attend.flow, scratch, further), attend(attend) {
    of_total = scratch.take<float>(tokens + CHUNK);
    sums_before = scratch.take<float>(keys);
  }

  // Values of the chunk, and the channel beside them.
  void load_sources(const Rows<const T> &v, int64_t at, int tokens) {
    this->load_rows(v, at, tokens, nullptr, weighted);
    for (int t = 0; attend.divides && t < tokens; t++) weighted[t * values + call.value_channels] = 1.f;
  }

  // In the order of time: gates and u, and M dR + u S as the first part of d Q, in grad_q.
  void recompute(int64_t sequence, int64_t head, int64_t length, const TokenFactors &factors, Memory &memory,
                 Records &records) {
    const typename Base::Tensors to(call, sequence, head);
    const auto grad_scale = rows_of<float>(attend.grad_scale, call.sinks, sequence, head);
    for (int64_t at = 0; at < length; at += CHUNK) {
      const int tokens = (int)(length - at < CHUNK ? length - at : CHUNK);
      this->load_features(to.q, to.k, at, tokens);
      factors.weigh(K, keys, at, tokens);
      if (decays) decay.load(to.log_decay, at, tokens), decay.fill_within();
      if (records.wanted && at % Records::MARK == 0) this->mark(memory, at, records);
      load_sources(to.v, at, tokens);
      this->load_rows(to.grad_out, at, tokens, nullptr, upstream);
      by_channel(weighted, values, this->V_by_channel);
      lower_product(upstream, this->V_by_channel, values, tokens, decays ? decay.within : nullptr, this->agreement);
      to_strips(K, CHUNK, keys, this->key_strips);
      this->project(memory, at, tokens, to, length, records);
      for (int t = 0; t < tokens; t++) {
        Vector dot{};
        for (int x = 0; x < keys; x += LANES) dot += load(grad_Q + t * keys + x) * load(Q + t * keys + x);
        records.grad_gate[at + t] = sum(dot), records.inverse_in[at + t] = 1.f;
      }
      if (attend.divides) divide(memory, at, tokens, records);
      for (int t = 0; t < tokens; t++) {
        const float inverse = records.inverse_in[at + t];
        records.allocation[at + t] = factors.scale_at(at + t) * inverse;
        if (grad_scale.first) *grad_scale.at(at + t) = records.grad_gate[at + t] * inverse;
        for (int x = 0; x < keys; x += LANES)
          store_part(to.grad_q.at(at + t), call.key_channels, x, load(grad_Q + t * keys + x));
      }
      if (decays) this->scale_rows(weighted, values, decay.leaving);
      memory.add(weighted, this->key_strips, tokens, decay.whole);
    }
    if (records.wanted) this->mark(memory, length, records);
  }

  // 1 / (T + eps), u, and what u adds to d Q.
  void divide(const Memory &memory, int64_t at, int tokens, Records &records) {
    read_sums(memory);
    Vector total[CHUNK], earlier[CHUNK];
    for (int t = 0; t < CHUNK; t++) total[t] = earlier[t] = Vector{};
    float *S = gated;  // (CHUNK, keys)
    for (int x = 0; x < keys; x += LANES) {
      Vector within{};
      const Vector before = load(sums_before + x);
      for (int t = 0; t < tokens; t++) {
        const Vector arriving = decays ? before * decay.arriving[t] : before, Q_t = load(Q + t * keys + x);
        within = (decays ? within * decay.gamma[t] : within) + load(K + t * keys + x);
        store(S + t * keys + x, arriving + within);
        total[t] += Q_t * (arriving + within), earlier[t] += Q_t * arriving;
      }
    }
    for (int t = 0; t < tokens; t += LANES) {
      const Vector inverse = 1.f / (sums(total + t) + (float)call.eps);
      const Vector u = -load(records.grad_gate + at + t) * inverse;
      store(records.inverse_in + at + t, inverse), store(of_total + at + t, u);
      if (records.wanted) store(records.arrived + at + t, load(records.arrived + at + t) + u * sums(earlier + t));
    }
    for (int t = 0; t < tokens; t++)
      for (int x = 0; x < keys; x += LANES)
        store(grad_Q + t * keys + x, load(grad_Q + t * keys + x) + load(S + t * keys + x) * of_total[at + t]);
  }

  // S before the chunk: the row of the memory, which lies across, behind those of values.
  void read_sums(const Memory &memory) {
    const int64_t row = call.value_channels;
    each_strip(keys, [&](auto width, int column) {
      for (int m = 0; m < width; m++)
        store(sums_before + column + m * LANES, load(memory.now + column * values + (row * width + m) * LANES));
    });
  }

  // Against time: d v, and d q and d k.
  void against_time(int64_t sequence, int64_t head, int64_t length, const TokenFactors &factors, Memory &growth,
                    Records &records) {
    const typename Base::Tensors to(call, sequence, head);
    const auto grad_weight = rows_of<float>(attend.grad_weight, call.sources, sequence, head);
    for (int64_t at = (length - 1) / CHUNK * CHUNK; length && at >= 0; at -= CHUNK) {
      const int tokens = (int)(length - at < CHUNK ? length - at : CHUNK);
      this->load_features(to.q, to.k, at, tokens);
      factors.weigh(K, keys, at, tokens);
      if (decays) decay.load(to.log_decay, at, tokens);
      load_sources(to.v, at, tokens);
      this->load_rows(to.grad_out, at, tokens, nullptr, upstream);
      for (int t = 0; t < CHUNK; t++) {
        gate[t] = t < tokens ? records.allocation[at + t] : 0.f, this->weight[t] = 1.f;
        if (attend.divides && t < tokens) upstream[t * values + call.value_channels] = of_total[at + t];
        for (int x = 0; x < keys; x += LANES) store(gated + t * keys + x, load(Q + t * keys + x) * gate[t]);
      }
      to_strips(upstream, CHUNK, values, this->upstream_strips);
      if (records.wanted) this->of_memory.restart_at_mark(at + tokens, length, growth, records);
      this->multiply(to, at, 0, tokens, growth, records);
      if (decays) this->scale_rows(gated, keys, decay.arriving);
      growth.add(gated, this->upstream_strips, tokens, decay.whole);
      if (records.wanted) this->of_memory.correct_at_mark(at, growth, records);
      for (int t = 0; t < tokens; t++)
        for (int x = 0; x < keys; x += LANES)
          store(grad_Q + t * keys + x, load_part(to.grad_q.at(at + t), call.key_channels, x) * gate[t]);
      if (factors.weight.first) unweigh(to.k, factors, grad_weight, at, tokens);
      this->write_inputs(to.q, to.k, to.grad_q, to.grad_k, at, tokens);
    }
  }

  // From w phi(k) to phi(k) and w: K and d K are then of features alone.
  void unweigh(const Rows<const T> &k, const TokenFactors &factors, const Rows<float> &grad_weight, int64_t at,
               int tokens) {
    for (int t = 0; t < tokens; t++) {
      Vector dot{};
      for (int x = 0; x < keys; x += LANES) {
        const int here = t * keys + x;
        const Vector given = load_part(k.at(at + t), call.key_channels, x);
        const Vector phi = feature(given, call.feature_map) * load(this->real + x);
        dot += phi * load(grad_K + here);
        store(K + here, phi), store(grad_K + here, load(grad_K + here) * factors.weight_at(at + t));
      }
      if (grad_weight.first) *grad_weight.at(at + t) = sum(dot);
    }
  }
};

}  // namespace
