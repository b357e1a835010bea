// Products of small matrices of floats that lie in the caches, by tiles that lie in registers.
#pragma once

#include <type_traits>

#include "vector.h"

namespace {

constexpr int CHUNK = 32;                  // tokens that meet directly
constexpr int ROWS = LANES == 16 ? 8 : 4;  // rows of a tile
constexpr int COLUMNS = 2;                 // vectors in a row of it
constexpr int STRIP = COLUMNS * LANES;

// A matrix that is a factor on the right lies in strips: the columns of one tile, row after row, then those of the
// next. Columns are a multiple of LANES; where they are no multiple of STRIP, the last strip is one vector wide.

// Call body(width of a strip in vectors, its first column) for every strip. The width is known to the compiler.
template <class Body>
INLINE void each_strip(int columns, Body body) {
  int column = 0;
  for (; column + STRIP <= columns; column += STRIP) body(std::integral_constant<int, COLUMNS>(), column);
  for (; column < columns; column += LANES) body(std::integral_constant<int, 1>(), column);
}

#if defined(__clang__)
#define UNROLL _Pragma("unroll 4")
#else
#define UNROLL _Pragma("GCC unroll 4")
#endif

template <int M>
struct Tile {
  Vector sum[ROWS][M];

  inline __attribute__((always_inline)) Tile() {
    for (int r = 0; r < ROWS; r++)
      for (int m = 0; m < M; m++) sum[r][m] = Vector{};
  }

  // Row r times factors[r].
  inline __attribute__((always_inline)) void scale(const float *factors) {
    for (int r = 0; r < ROWS; r++)
      for (int m = 0; m < M; m++) sum[r][m] *= factors[r];
  }

  // totals[r] gathers row r times row r of a matrix at this tile's place, by lanes.
  inline __attribute__((always_inline)) void meet(const float *rows, int stride, Vector *totals) const {
    for (int r = 0; r < ROWS; r++)
      for (int m = 0; m < M; m++) totals[r] += sum[r][m] * load(rows + r * stride + m * LANES);
  }

  // sum[r] += sum over i in [begin, end) of a[r * a_row + i * a_step] * b[i], b being a strip.
  inline __attribute__((always_inline)) void add(const float *a, int a_row, int a_step, const float *b, int begin,
                                                 int end) {
    UNROLL
    for (int i = begin; i < end; i++) {
      Vector row[M];
      for (int m = 0; m < M; m++) row[m] = load(b + (i * M + m) * LANES);
      for (int r = 0; r < ROWS; r++) {
        const Vector factor = all(a[r * a_row + i * a_step]);
        for (int m = 0; m < M; m++) sum[r][m] += factor * row[m];
      }
    }
  }
};

// rows (count, columns) to strips
inline void to_strips(const float *rows, int count, int columns, float *out) {
  each_strip(columns, [&](auto width, int column) {
    for (int t = 0; t < count; t++)
      for (int m = 0; m < width; m++)
        store(out + column * count + (t * width + m) * LANES, load(rows + t * columns + column + m * LANES));
  });
}

// Where a row of CHUNK columns in strips has its column t, of so many rows.
INLINE int in_chunk_strips(int row, int t, int rows) {
  constexpr int WIDTH = STRIP <= CHUNK ? STRIP : LANES;
  return t / WIDTH * WIDTH * rows + row * WIDTH + t % WIDTH;
}

// rows (CHUNK, columns) to its transpose (columns, CHUNK), in strips
inline void by_channel(const float *rows, int columns, float *out) {
  for (int t = 0; t < CHUNK; t += LANES)
    for (int x = 0; x < columns; x += LANES) {
      Vector block[LANES];
      for (int i = 0; i < LANES; i++) block[i] = load(rows + (t + i) * columns + x);
      transpose(block);
      for (int i = 0; i < LANES; i++) store(out + in_chunk_strips(x + i, t, columns), block[i]);
    }
}

// The lower triangle of A B^T (CHUNK, CHUNK) for A (CHUNK, channels) and B by channel; times `factors` (CHUNK, CHUNK)
// element by element, unless they are null. Rows from `tokens` on, and what is above the diagonal strips, are not
// written.
inline void lower_product(const float *A, const float *B, int channels, int tokens, const float *factors, float *out) {
  each_strip(CHUNK, [&](auto width, int column) {
    for (int i = column; i < tokens; i += ROWS) {
      Tile<width> tile;
      tile.add(A + i * channels, channels, 1, B + column * channels, 0, channels);
      for (int r = 0; r < ROWS; r++)
        for (int m = 0; m < width; m++) {
          const int at = column + m * LANES;
          const auto past = lane_numbers() + (float)at <= (float)(i + r);
          const Vector product = factors ? tile.sum[r][m] * load(factors + (i + r) * CHUNK + at) : tile.sum[r][m];
          store(out + (i + r) * CHUNK + at, past ? product : Vector{});
        }
    }
  });
}

// All of A B^T, likewise.
inline void square_product(const float *A, const float *B, int channels, int tokens, const float *factors, float *out) {
  each_strip(CHUNK, [&](auto width, int column) {
    for (int i = 0; i < tokens; i += ROWS) {
      Tile<width> tile;
      tile.add(A + i * channels, channels, 1, B + column * channels, 0, channels);
      for (int r = 0; r < ROWS; r++)
        for (int m = 0; m < width; m++) {
          const int at = (i + r) * CHUNK + column + m * LANES;
          store(out + at, factors ? tile.sum[r][m] * load(factors + at) : tile.sum[r][m]);
        }
    }
  });
}

}  // namespace
