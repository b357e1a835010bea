// Factors by which sums over the past shrink from token to token: those of a chunk.
#pragma once

#include <cmath>

#include "products.h"
#include "tokens.h"

namespace {

// A log-decay from -10,000 to 0; NaN stays NaN.
inline double clip_log_decay(float log_decay) { return log_decay > 0 ? 0. : log_decay < -1e4f ? -1e4 : log_decay; }

// gamma of a log-decay. The double matters: over thousands of tokens the error of a rounded factor adds up.
inline double decay_of(float log_decay) { return log_decay >= 0 ? 1. : std::exp(clip_log_decay(log_decay)); }

// With gamma(i, j) from token j to a later one i.
struct Decay {
  double each[CHUNK];      // gamma of each token; 1 where no token is
  float gamma[CHUNK];      // the same
  float arriving[CHUNK];   // from before the chunk to each token
  float leaving[CHUNK];    // from each token to the end of the chunk
  double log_each[CHUNK];  // logarithms, at most 0
  double whole = 1., log_whole = 0.;
  float within[CHUNK * CHUNK];  // gamma(i, j) in row i; zero for j > i

  void load(const Rows<const float> &log_decay, int64_t first, int tokens) {
    const bool constant = log_decay.stride == 0;
    const double of_all = constant ? decay_of(*log_decay.first) : 0.;
    whole = 1., log_whole = 0.;
    for (int t = 0; t < CHUNK; t++) {
      const float given = t < tokens ? *log_decay.at(first + t) : 0.f;
      log_each[t] = clip_log_decay(given);
      each[t] = t >= tokens ? 1. : constant ? of_all : decay_of(given);
      gamma[t] = (float)each[t];
      whole *= each[t], log_whole += log_each[t];
      arriving[t] = (float)whole;
    }
    double behind = 1.;
    for (int t = CHUNK - 1; t >= 0; t--) leaving[t] = (float)behind, behind *= each[t];
  }

  // Products of neighbours, never quotients of products: those would vanish. Of doubles, since all tokens may have the
  // same gamma and then its error, too.
  void fill_within() {
    for (int column = 0; column < CHUNK; column += HALF_LANES) {
      Doubles row{};
      for (int i = 0; i < column; i++) store_singles(within + i * CHUNK + column, row);
      for (int i = column; i < CHUNK; i++) {
        row *= each[i];
        if (i < column + HALF_LANES) row[i - column] = 1.;
        store_singles(within + i * CHUNK + column, row);
      }
    }
  }
};

// Numbers next to zero, which decay makes many of, count as zero while this lives: most CPUs compute with them a
// hundred times more slowly.
struct WithoutDenormals {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  explicit WithoutDenormals(bool wanted) {
    if (wanted) _mm_setcsr(before | 0x8040);
  }
  ~WithoutDenormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;
  explicit WithoutDenormals(bool wanted) {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    if (wanted) asm volatile("msr fpcr, %0" ::"r"(before | 1 << 24));
  }
  ~WithoutDenormals() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#else
  explicit WithoutDenormals(bool) {}
#endif
};

}  // namespace
