// Sums over the tokens of AFT, a vector of channels at a time.
#pragma once

#include <cmath>

#include "tokens.h"

namespace {

// A growing sum for each channel, exact over millions of tokens: those of a run are added up as floats before they go
// into a sum of doubles.
struct RunningSum {
  double *total;
  float *before, *recent;  // the total as a float; what came since

  RunningSum(int width, Scratch &scratch)
      : total(scratch.take<double>(width)), before(scratch.take<float>(width)), recent(scratch.take<float>(width)) {}

  void start(int channel, double from) const {
    total[channel] = from, before[channel] = (float)from, recent[channel] = 0.f;
  }

  inline __attribute__((always_inline)) Vector now(int x) const { return load(before + x) + load(recent + x); }

  inline __attribute__((always_inline)) void add(int x, Vector y) const { store(recent + x, load(recent + x) + y); }

  void flush(int x) const {
    for (int half = x; half < x + LANES; half += HALF_LANES) {
      const Doubles grown = load_doubles(total + half) + to_doubles(recent + half);
      store_doubles(total + half, grown);
      store_singles(before + half, grown);
    }
    store(recent + x, Vector{});
  }

  void scale(int x, Vector factor) const {
    for (int i = 0; i < LANES; i++) total[x + i] *= factor[i];
    store(before + x, load(before + x) * factor);
    store(recent + x, load(recent + x) * factor);
  }
};

// Of every channel: sum exp(k - scale) v and sum exp(k - scale). The scale stays where it is until a key exceeds it by
// RISE: so what is computed up to a token knows no later one, and the largest key to come overflows nothing.
struct KeySums {
  static constexpr float RISE = 16.f;
  const int count, width;  // channels, and padded
  float *scale;
  RunningSum weighted, weight;

  KeySums(int count, Scratch &scratch)
      : count(count),
        width(padded(count)),
        scale(scratch.take<float>(width)),
        weighted(width, scratch),
        weight(width, scratch) {}

  // The first key is above it. Where there is no channel, keys are read as zeros, which shall raise nothing.
  static float scale_of_nothing(bool there) { return there ? (float)LOG_ZERO : 0.f; }

  // Go on from a state; null: from nothing.
  void start(const double *log_weight, const double *mean) const {
    for (int c = 0; c < width; c++) {
      const bool there = c < count, some = there && log_weight && log_weight[c] > LOG_ZERO / 2;
      scale[c] = some ? (float)log_weight[c] : scale_of_nothing(there);
      const double one = some ? std::exp(log_weight[c] - scale[c]) : 0.;  // but for the rounding of the scale
      weighted.start(c, some ? one * mean[c] : 0.), weight.start(c, one);
    }
  }

  // exp(k - scale). Where the scale has to rise first, told(factor) hears what that multiplied the sums by.
  template <class Told>
  inline __attribute__((always_inline)) Vector weigh(int x, Vector key, Told told) const {
    if (__builtin_expect(any(key > load(scale + x) + RISE), 0)) told(rise(x, key));
    return exp(key - load(scale + x));
  }

  __attribute__((noinline)) Vector rise(int x, Vector key) const {
    const Vector from = load(scale + x), to = key > from + RISE ? key : from, factor = exp(from - to);
    store(scale + x, to);
    weighted.scale(x, factor), weight.scale(x, factor);
    return factor;
  }

  void flush() const {
    for (int x = 0; x < width; x += LANES) weighted.flush(x), weight.flush(x);
  }

  // `channels`: how far apart the three parts of a mark lie.
  void write_mark(float *mark, int64_t channels) const {
    memcpy(mark, scale, sizeof(float) * count);
    memcpy(mark + channels, weighted.before, sizeof(float) * count);
    memcpy(mark + 2 * channels, weight.before, sizeof(float) * count);
  }

  void read_mark(const float *mark, int64_t channels) const {
    for (int c = 0; c < width; c++) {
      const bool there = c < count;
      scale[c] = there ? mark[c] : scale_of_nothing(there);
      weighted.start(c, there ? mark[channels + c] : 0.), weight.start(c, there ? mark[2 * channels + c] : 0.);
    }
  }

  // sum exp(k) v / sum exp(k); 0 where there is no key
  void means(float *mean) const {
    for (int c = 0; c < width; c++)
      mean[c] = weight.total[c] != 0. ? (float)(weighted.total[c] / weight.total[c]) : 0.f;
  }

  void finish(double *log_weight, double *mean) const {
    for (int c = 0; c < count; c++) {
      const double b = weight.total[c];
      log_weight[c] = b != 0. ? scale[c] + std::log(b) : LOG_ZERO;
      mean[c] = b != 0. ? weighted.total[c] / b : 0.;
    }
  }
};

}  // namespace
