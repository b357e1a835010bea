// Linear attention of features with decay in both directions, with the products of bidirectional_decay.h. What outputs
// are divided by is one more channel of them: that of values 1. The letters are those of attend_backward.h.
#pragma once

#include "attend.h"
#include "bidirectional_decay_backward.h"

namespace {

struct AttendDecay : BidirectionalDecayBackward {
  const AttendCall &attend;

  AttendDecay(const AttendCall &attend, Scratch &scratch)
      : BidirectionalDecayBackward(attend.flow, scratch, attend.divides), attend(attend) {}

  // Everything of a head; keys times the weights of their tokens.
  template <class T>
  void load(int64_t sequence, int64_t h, const TokenFactors &factors, DecayedHead &head) {
    load_head<T>(sequence, h, head);
    for (int64_t t = 0; t < head.tokens; t++) {
      head.weight[t] = 1.f;
      if (attend.divides) head.V[t * values + call.value_channels] = 1.f;
    }
    for (int64_t at = 0; at < head.tokens; at += CHUNK) factors.weigh(head.K + at * keys, keys, at, head.in_chunk(at));
  }

  // Of outputs that are not yet divided: 1 / (T + eps), or 1, and a.
  void find_gates(const TokenFactors &factors, DecayedHead &head) const {
    for (int64_t t = 0; t < head.tokens; t++) {
      const float total = attend.divides ? head.partial[t * values + call.value_channels] + (float)call.eps : 1.f;
      head.inverse_in[t] = 1.f / total, head.allocation[t] = factors.scale_at(t);
    }
  }

  // u, behind the gradients of outputs, and those of scales. Outputs are not wanted any longer.
  void gates_backward(const Rows<float> &grad_scale, DecayedHead &head) const {
    for (int64_t t = 0; t < head.tokens; t++) {
      Vector dot{};
      if (attend.divides) head.partial[t * values + call.value_channels] = 0.f;
      for (int x = 0; x < values; x += LANES)
        dot += ::load(head.partial + t * values + x) * ::load(head.upstream + t * values + x);
      const float of_scale = sum(dot) * head.inverse_in[t];
      if (grad_scale.first) *grad_scale.at(t) = of_scale;
      if (attend.divides) head.upstream[t * values + call.value_channels] = -of_scale;
    }
  }

  // d Q gets its gate; of d (w phi(k)) come those of weights and features.
  template <class T>
  void finish(int64_t sequence, int64_t h, const TokenFactors &factors, DecayedHead &head) const {
    const auto k = rows_of<const T>(call.k, call.sinks, sequence, h);
    const auto grad_weight = rows_of<float>(attend.grad_weight, call.sinks, sequence, h);
    for (int64_t t = 0; t < head.tokens; t++) {
      const float of_gate = head.allocation[t] * head.inverse_in[t], weight = factors.weight_at(t);
      Vector dot{};
      for (int x = 0; x < keys; x += LANES) {
        const int64_t here = t * keys + x;
        store(head.grad_Q + here, ::load(head.grad_Q + here) * of_gate);
        if (!factors.weight.first) continue;
        const Vector features = phi(k.at(t), x) * ::load(real + x), of_K = ::load(head.grad_K + here);
        dot += features * of_K;
        store(head.K + here, features), store(head.grad_K + here, of_K * weight);
      }
      if (grad_weight.first) *grad_weight.at(t) = sum(dot);
    }
  }
};

}  // namespace
