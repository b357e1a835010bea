// Rows of tensors in, buffers of padded floats out, and back; feature maps; scratch memory.
#pragma once

#include <cstdlib>

#include "call.h"
#include "vector.h"

namespace {

constexpr float RELU_FLOOR = 1e-6f;
constexpr double LOG_ZERO = -1e30;  // stands for the logarithm of nothing
constexpr int AHEAD = 16;           // rows that are fetched into the caches before they are wanted

inline int padded(int64_t channels) { return (int)((channels + LANES - 1) / LANES * LANES); }

// The tokens of one sequence and head in a tensor.
template <class T>
struct Rows {
  T *first;
  int64_t stride;
  const int32_t *places;  // or null: one after the other
  inline __attribute__((always_inline)) T *at(int64_t token) const {
    return first + (places ? places[token] : token) * stride;
  }
};

template <class T>
Rows<T> rows_of(const View &view, const Side &side, int64_t sequence, int64_t head) {
  const int64_t *row = side.rows + 3 * sequence;
  if (!view.data) return {nullptr, 0, nullptr};
  T *data = static_cast<T *>(view.data) + row[0] * view.batch + head * view.head;
  if (side.places) return {data, view.length, side.places + row[1]};
  return {data + row[1] * view.length, view.length, nullptr};
}

// Start to bring a row into the second cache (to be read) or the first (to be written).
template <int WRITING, class T>
INLINE void fetch(const Rows<T> &rows, int64_t token, int64_t count, int64_t channels) {
  if (token >= count) return;
  const char *row = reinterpret_cast<const char *>(rows.at(token));
  for (int byte = 0; byte < channels * (int)sizeof(T); byte += 64)
    __builtin_prefetch(row + byte, WRITING, WRITING ? 3 : 2);
}

// The vector at a channel of a row; zero beyond the channels there are.
template <class T>
INLINE Vector load_part(const T *row, int64_t channels, int at) {
  if (at + LANES <= channels) return load(row + at);
  float part[LANES];
  for (int i = 0; i < LANES; i++) part[i] = at + i < channels ? to_float(row[at + i]) : 0.f;
  return load(part);
}

template <class T>
INLINE void store_part(T *row, int64_t channels, int at, Vector x) {
  if (at + LANES <= channels) return store(row + at, x);
  for (int i = 0; i < LANES && at + i < channels; i++) from_float(row + at + i, x[i]);
}

// phi(x)
INLINE Vector feature(Vector x, int64_t feature_map) {
  if (feature_map == 0) return sigmoid(x);
  if (feature_map == 1) return max(x, Vector{}) + RELU_FLOOR;
  return feature_map == 2 ? exp(min(x, Vector{})) + max(x, Vector{}) : x;
}

// phi'(x), given phi(x) too
INLINE Vector feature_slope(Vector x, Vector phi, int64_t feature_map) {
  if (feature_map == 0) return phi * (1.f - phi);
  if (feature_map == 1) return x > 0.f ? all(1.f) : Vector{};
  return feature_map == 2 ? min(phi, all(1.f)) : all(1.f);
}

// Memory of one worker, taken in pieces. Without a base it only counts.
struct Scratch {
  char *base;
  size_t used = 0;
  explicit Scratch(char *base) : base(base) {}
  template <class E>
  E *take(int64_t count) {
    const size_t at = used;
    used += (count * sizeof(E) + 63) / 64 * 64;
    return base ? reinterpret_cast<E *>(base + at) : nullptr;
  }
};

inline char *allocate(size_t bytes) {
  void *memory = nullptr;
  return posix_memalign(&memory, 64, bytes) ? nullptr : static_cast<char *>(memory);
}

}  // namespace
