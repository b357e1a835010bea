// What the runs of both forms share.
#pragma once

#include <atomic>
#include <cmath>
#include <new>

#include "parallel.h"
#include "tokens.h"

namespace {

// All memory of a task, taken at once: build(scratch, real) is run twice, first to count. Whether there was enough.
template <class Build>
bool with_scratch(Build build) {
  Scratch count(nullptr);
  build(count, false);
  char *base = allocate(count.used);
  if (!base) return false;
  Scratch scratch(base);
  build(scratch, true);
  free(base);
  return true;
}

// Heads that one task takes along through a sequence: their rows are neighbours, and a page of memory has several.
struct Bundle {
  int64_t sequence, head, count;
};

inline int64_t bundle_size(const FlowCall &call) {
  const int64_t each = call.sequences * call.heads / (call.threads > 0 ? call.threads : 1);
  const int64_t most = each < 1 ? 1 : each > 8 ? 8 : each;
  return most < call.heads ? most : call.heads;
}

inline int64_t bundles(const FlowCall &call) {  // of one sequence
  return (call.heads + bundle_size(call) - 1) / bundle_size(call);
}

inline Bundle bundle_of(const FlowCall &call, int64_t task) {
  const int64_t size = bundle_size(call), head = task % bundles(call) * size;
  return {task / bundles(call), head, head + size < call.heads ? size : call.heads - head};
}

constexpr int64_t PIECE = 512;  // a piece of a sequence is a multiple of this

// Pieces that each sequence is cut into: one, unless threads outnumber heads.
inline int64_t pieces_of_heads(const FlowCall &call, int64_t longest) {
  const int64_t heads = call.sequences * call.heads;
  const int64_t wanted = heads > 0 ? call.threads / heads : 1, most = longest / (2 * PIECE);
  const int64_t pieces = wanted < most ? wanted : most;
  return pieces < 1 ? 1 : pieces;
}

inline int64_t piece_start(int64_t tokens, int64_t piece, int64_t pieces) {
  const int64_t start = (tokens + pieces - 1) / pieces * piece;
  const int64_t even = (start + PIECE - 1) / PIECE * PIECE;
  return even < tokens && piece < pieces ? even : tokens;
}

// flow(h) becomes count(h) times its share among the heads.
template <class Count, class Flow>
void softmax_over_heads(int64_t heads, Count count, Flow flow) {
  double largest = flow(0), total = 0;
  for (int64_t h = 1; h < heads; h++) largest = flow(h) > largest ? flow(h) : largest;
  for (int64_t h = 0; h < heads; h++) total += std::exp(flow(h) - largest);
  for (int64_t h = 0; h < heads; h++) flow(h) = (float)(count(h) * std::exp(flow(h) - largest) / total);
}

// grad(h), of such a weight, becomes that of the flow.
template <class Count, class Weight, class Grad>
void softmax_gradient(int64_t heads, Count count, Weight weight, Grad grad) {
  const double of_first = count(0);
  double mean = 0;
  for (int64_t h = 0; h < heads; h++) mean += (double)weight(h) * grad(h) / of_first;
  for (int64_t h = 0; h < heads; h++) grad(h) = (float)(weight(h) * (grad(h) - mean * (of_first / count(h))));
}

}  // namespace
