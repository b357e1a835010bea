// What Python passes to the kernels: the plain C interface. native.py in flowformer/mechanisms/flow/ and aft/ has the
// same structures.
#pragma once

#include <cstdint>

extern "C" {

// A tensor (batch, length, heads, channels), or (batch, length, channels) for AFT. Strides count elements; channels are
// adjacent.
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
  double *count;           // tokens, decayed (sequences, heads)
  double *sums;            // (sequences, heads, 4, key channels)
  double *log_normaliser;  // (sequences, heads)
  double *memory;          // (sequences, heads, key channels, value channels)
};

struct FlowCall {
  View q, k, v, out;
  View log_decay;                         // float; without data: no decay; strides may be 0
  View grad_out, grad_q, grad_k, grad_v;  // grad_q and grad_k are float whatever the inputs are
  View grad_log_decay;                    // float, of each token; without data: not wanted
  Side sinks, sources;
  State before, after, grad_before, grad_after;
  int64_t sequences, heads, key_channels, value_channels, threads;
  int64_t rescale;
  int64_t half;         // 1 for bfloat16
  int64_t feature_map;  // 0 sigmoid, 1 relu + 1e-6, 2 elu + 1, 3 the inputs are features
  int64_t competition;  // 0 none, 1 over the sequence, 2 over heads
  int64_t allocation;
  double clamp;  // below 0: none
  double eps, flow_eps;
};

// Linear attention of features: those of Flow-Attention's arguments that it has, and its own. State::sums is the sum of
// weighted keys alone, (sequences, heads, key channels); it is read where `divides`. eps is added to what is divided
// by.
struct AttendCall {
  FlowCall flow;
  View weight, scale;            // float, of sources and of sinks; without data: 1
  View grad_weight, grad_scale;  // float; without data: not wanted
  int64_t divides;               // outputs by the sums of weights
};

// Sizes and options of a step. Its tensors are contiguous: q and k (batch, heads, key channels), v and the output
// (batch, heads, value channels). Log-decays are (heads), or (batch, heads) with a row for each sequence.
struct StepCall {
  int64_t batch, heads, key_channels, value_channels, threads;
  int64_t decay_of_rows;
  int64_t half, feature_map, competition, allocation;
  double clamp, eps, flow_eps;
};

// AFT-simple. Masks are (batch, length), 1 for a real token; null where all are. States and gradients of states are
// (batch, channels).
struct AftCall {
  View q, k, v, out;
  View grad_out, grad_q, grad_k, grad_v;
  const uint8_t *key_mask, *query_mask;
  const double *log_weight, *mean;  // before the first token; null where nothing is
  double *log_weight_after, *mean_after;
  // The sums that the backward pass starts from: (batch, marks, 3, channels) holds scale, sum exp(k - scale) v and sum
  // exp(k - scale). Causal: a mark before each run of tokens and one behind the last. Bidirectional: that one alone.
  float *marks;
  const double *grad_log_weight_after, *grad_mean_after;  // null: zero
  double *grad_log_weight, *grad_mean;
  int64_t batch, queries, keys, channels, threads;
  int64_t run;   // tokens
  int64_t half;  // 1 for bfloat16
};

}  // extern "C"
