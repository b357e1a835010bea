// The K x V sum that carries the past, and its gradient.
#pragma once

#include "products.h"
#include "tokens.h"

namespace {

// A growing sum of products A^T B over tokens, (rows, columns), exact over millions of tokens: FLUSH chunks are added
// up as floats before they go into a sum of doubles.
struct Memory {
  static constexpr int FLUSH = 32;
  const int64_t real_rows, real_columns;
  const int rows, columns;  // padded to LANES
  double *sum;              // (real_rows, real_columns); transposed where `across`
  float *now;               // the sum as floats, in strips
  float *recent;            // what came since the last flush, in strips
  bool across = false;
  int chunks = 0;
  double kept = 1.;  // of the sum, by the decay since the last flush

  Memory(int64_t rows, int64_t columns, int padded_rows, int padded_columns, Scratch &scratch)
      : real_rows(rows), real_columns(columns), rows(padded_rows), columns(padded_columns) {
    now = scratch.take<float>(this->rows * this->columns);
    recent = scratch.take<float>(this->rows * this->columns);
  }

  // Go on from a sum, which is changed in place.
  void start(double *from) {
    clear(from);
    flush();
  }

  // Go on from a sum that is known to be zero.
  void start_from_zero(double *from) {
    memset(from, 0, sizeof(double) * real_rows * real_columns);
    clear(from);
  }

  void clear(double *from) {
    sum = from, chunks = 0, kept = 1.;
    memset(recent, 0, sizeof(float) * rows * columns);
    memset(now, 0, sizeof(float) * rows * columns);
  }

  void flush() {
    each_strip(columns, [&](auto width, int column) {
      for (int d = 0; d < real_rows; d++)
        for (int m = 0; m < width; m++) flush_vector(d, column + m * LANES, column * rows + (d * width + m) * LANES);
    });
    kept = 1.;
  }

  // Row d from column x on, which lie at a place in the strips.
  void flush_vector(int d, int x, int at) {
    if (across || x + LANES > real_columns) {
      for (int i = 0; i < LANES && x + i < real_columns; i++) {
        double &total = sum[across ? (x + i) * real_rows + d : d * real_columns + x + i];
        now[at + i] = (float)(total = total * kept + recent[at + i]);
        recent[at + i] = 0.f;
      }
      return;
    }
    double *total = sum + d * real_columns + x;
    for (int half = 0; half < LANES; half += HALF_LANES) {
      const Doubles grown = load_doubles(total + half) * kept + to_doubles(recent + at + half);
      store_doubles(total + half, grown);
      store_singles(now + at + half, grown);
    }
    store(recent + at, Vector{});
  }

  void scale(double factor) {
    for (int64_t i = 0; i < real_rows * real_columns; i++) sum[i] *= factor;
    for (int i = 0; i < rows * columns; i++) recent[i] *= (float)factor, now[i] *= (float)factor;
  }

  // Add A^T B for A (CHUNK, rows) and B (CHUNK, columns) in strips, and decay what was there by a factor: of 1, without
  // any rounding.
  void add(const float *A, const float *B, int tokens, double factor = 1.) {
    const float decay = (float)factor;
    kept *= factor;
    each_strip(columns, [&](auto width, int column) {
      for (int d = 0; d < rows; d += ROWS) {
        Tile<width> tile;
        tile.add(A + d, 1, rows, B + column * CHUNK, 0, tokens);
        for (int r = 0; r < ROWS && d + r < rows; r++)
          for (int m = 0; m < width; m++) {
            const int at = column * rows + ((d + r) * width + m) * LANES;
            store(recent + at, load(recent + at) * decay + tile.sum[r][m]);
            store(now + at, load(now + at) * decay + tile.sum[r][m]);
          }
      }
    });
    if (++chunks % FLUSH == 0) flush();
  }
};

}  // namespace
