// What the passes of the backward causal form leave for each other.
#pragma once

#include "products.h"
#include "tokens.h"

namespace {

// What a pass in the order of time leaves for the one against it, for every token of a sequence and head.
struct Records {
  static constexpr int64_t MARK =
      512;  // tokens between two memories that are kept; pieces of a sequence start at marks

  float *inverse_in, *inverse_out;
  float *allocation;
  float *share;      // exp(O^) / sum exp(O^); for competition over heads the weight
  float *inside;     // 1 where the clamp does not bind, else 0
  float *grad_gate;  // d (allocation / I)
  float *grad_flow;  // d w, then d c
  float *before;     // the sums before each chunk, as Flows::before has them (chunks, 4, keys)
  const bool decays, wanted;
  // With decay.
  float *past_count, *rest;  // n - 1, 1 - share
  // Where the gradient of decay is wanted.
  float *conserved_in, *conserved_out;
  float *arrived;  // of d (allocation / I), the part of the memory before the chunk
  float *grad_count, *grad_decay;
  double *marks;  // the memory before every token that is a multiple of MARK, and behind the last

  Records(const FlowCall &call, int64_t tokens, int keys, int64_t matrix, Scratch &scratch)
      : decays(call.log_decay.data), wanted(call.grad_log_decay.data) {
    const int64_t chunks = (tokens + CHUNK - 1) / CHUNK;
    for (float **row : {&inverse_in, &inverse_out, &allocation, &share, &inside, &grad_gate, &grad_flow})
      *row = scratch.take<float>(chunks * CHUNK);
    before = scratch.take<float>(chunks * 4 * keys);
    for (float **row : {&past_count, &rest}) *row = scratch.take<float>(decays ? chunks * CHUNK : 0);
    for (float **row : {&conserved_in, &conserved_out, &arrived, &grad_count, &grad_decay})
      *row = scratch.take<float>(wanted ? chunks * CHUNK : 0);
    marks = scratch.take<double>(wanted ? (mark(tokens) + 1) * matrix : 0);
  }

  // The number of the mark at a token, or of the one behind the last.
  static int64_t mark(int64_t token) { return (token + MARK - 1) / MARK; }
};

// What later tokens want of earlier ones, but for the memory.
struct Future {
  double *sums[4];    // d sum K (Z), d sum Q (W), d sum K n / O (X), d sum Q n / I (Y)
  double normaliser;  // of the logarithm of sum exp(O^)
  double count;       // of n, with decay

  Future(int keys, Scratch &scratch) {
    for (double *&sum : sums) sum = scratch.take<double>(keys);
  }
};

}  // namespace
