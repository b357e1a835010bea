// What Python passes to the kernels: the plain C interface. flowformer/ops/native/flow.py has the same structure.
#pragma once

#include <cstdint>

extern "C" {

// A tensor (batch, length, heads, channels). Strides count elements; channels are adjacent.
struct View {
  void *data;
  int64_t batch, length, head;
};

// Which tokens the sequences of one side (sinks or sources) have: of sequence s the row of the batch rows[3 s], the
// first token rows[3 s + 1] and their number rows[3 s + 2]. With places, the tokens are places[first], places[first +
// 1], ...
struct Side {
  const int64_t *rows;
  const int32_t *places;
};

// The past of every sequence and head, or gradients of it. sums holds sum K, sum Q, sum K n / O and sum Q n / I.
struct State {
  int64_t *length;         // (sequences)
  double *sums;            // (sequences, heads, 4, key channels)
  double *log_normaliser;  // (sequences, heads)
  double *memory;          // (sequences, heads, key channels, value channels)
};

struct FlowCall {
  View q, k, v, out;
  View grad_out, grad_q, grad_k, grad_v;  // grad_q and grad_k are float whatever the inputs are
  Side sinks, sources;
  State before, after, grad_before, grad_after;
  int64_t sequences, heads, key_channels, value_channels, threads;
  int64_t rescale;
  int64_t half;         // 1 for bfloat16
  int64_t feature_map;  // 0 sigmoid, 1 relu + 1e-6
  int64_t competition;  // 0 none, 1 over the sequence, 2 over heads
  int64_t allocation;
  double clamp;  // below 0: none
  double eps, flow_eps;
};

// Sizes and options of a step. Its tensors are contiguous: q and k (batch, heads, key channels), v and the output
// (batch, heads, value channels).
struct StepCall {
  int64_t batch, heads, key_channels, value_channels, threads;
  int64_t half, feature_map, competition, allocation;
  double clamp, eps, flow_eps;
};

}  // extern "C"
