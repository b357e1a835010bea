// Vectors of floats, as wide as the level of instructions that this file is compiled for.
//
// GCC's and Clang's vector extensions say what is to be done, the compiler how: AVX-512, AVX2, SSE2 and NEON come from
// one source. Everything lies in an unnamed namespace: the same code is compiled several times, and the linker must not
// take one level's for another's.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(FLOWFORMER_LANES)
constexpr int LANES = FLOWFORMER_LANES;  // for tests: wide code on a narrow machine
#elif defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))

struct bfloat16 {
  uint16_t bits;
};

INLINE Vector load(const float *p) {
  Vector x;
  memcpy(&x, p, sizeof x);
  return x;
}

INLINE Vector load(const bfloat16 *p) {
  Halves x;
  memcpy(&x, p, sizeof x);
  return (Vector)(__builtin_convertvector(x, Bits) << 16);
}

INLINE void store(float *p, Vector x) { memcpy(p, &x, sizeof x); }

// Rounds to nearest, ties to even, as PyTorch does; NaN stays NaN.
INLINE void store(bfloat16 *p, Vector x) {
  Bits bits = (Bits)x;
  bits = (x == x) ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : Bits{} + 0x7fc0u;
  const Halves halves = __builtin_convertvector(bits, Halves);
  memcpy(p, &halves, sizeof halves);
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(bfloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
INLINE void from_float(float *p, float x) { *p = x; }
INLINE void from_float(bfloat16 *p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  p->bits = x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fc0u;
}

INLINE Vector all(float x) { return x - Vector{}; }

// Whether a comparison holds in any lane.
INLINE bool any(Integers holds) {
#if defined(__AVX512F__) && !defined(FLOWFORMER_LANES)
  return _mm512_movepi32_mask((__m512i)holds);
#elif defined(__AVX2__) && !defined(FLOWFORMER_LANES)
  return _mm256_movemask_ps((__m256)holds);
#elif defined(__SSE2__) && !defined(FLOWFORMER_LANES)
  return _mm_movemask_ps((__m128)holds);
#else
  int32_t some = 0;
  for (int i = 0; i < LANES; i++) some |= holds[i];
  return some;
#endif
}

// One instruction each, which compilers do not see in a comparison and a choice. Where b is NaN, so is the result.
#if defined(__AVX512F__) && !defined(FLOWFORMER_LANES)
INLINE Vector min(Vector a, Vector b) { return (Vector)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE Vector max(Vector a, Vector b) { return (Vector)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__) && !defined(FLOWFORMER_LANES)
INLINE Vector min(Vector a, Vector b) { return (Vector)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE Vector max(Vector a, Vector b) { return (Vector)_mm256_max_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__) && !defined(FLOWFORMER_LANES)
INLINE Vector min(Vector a, Vector b) { return (Vector)_mm_min_ps((__m128)a, (__m128)b); }
INLINE Vector max(Vector a, Vector b) { return (Vector)_mm_max_ps((__m128)a, (__m128)b); }
#else
INLINE Vector min(Vector a, Vector b) { return a < b ? a : b; }
INLINE Vector max(Vector a, Vector b) { return a > b ? a : b; }
#endif

// lane number, as a float: 0, 1, 2, ...
INLINE Vector lane_numbers() {
  Vector x;
  for (int i = 0; i < LANES; i++) x[i] = (float)i;
  return x;
}

// ------------------------------------------------------------------------------------------------------------- doubles

constexpr int HALF_LANES = LANES / 2;
typedef double Doubles __attribute__((vector_size(4 * LANES)));
typedef float Singles __attribute__((vector_size(2 * LANES)));

INLINE Doubles load_doubles(const double *p) {
  Doubles x;
  memcpy(&x, p, sizeof x);
  return x;
}

INLINE void store_doubles(double *p, Doubles x) { memcpy(p, &x, sizeof x); }

INLINE double sum_doubles(Doubles x) {
  double total = 0;
  for (int i = 0; i < HALF_LANES; i++) total += x[i];
  return total;
}

INLINE Doubles to_doubles(const float *p) {
  Singles x;
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Doubles);
}

INLINE void store_singles(float *p, Doubles x) {
  const Singles rounded = __builtin_convertvector(x, Singles);
  memcpy(p, &rounded, sizeof rounded);
}

// --------------------------------------------------------------------------------------------------- exponentials

// 2^f for |f| <= 1/2: the polynomial of degree 6 that is nearest in relative error, 2e-9
INLINE Vector power_of_fraction(Vector f) {
  Vector y = f * 1.5345812e-4f + 1.3399931e-3f;
  y = y * f + 9.618489e-3f;
  y = y * f + 5.5503286e-2f;
  y = y * f + 2.4022646e-1f;
  y = y * f + 6.931472e-1f;
  return y * f + 1.f;
}

// exp(x), relative error about 1e-7 + 1e-8 |x|, for x in [-87, 88]; what lies outside counts as the nearest end; NaN
// stays NaN.
struct Exponential {
  Vector fraction, power;  // exp(x) = fraction * power, power being a power of 2
};

// exp(SIGN x)
template <int SIGN>
INLINE Exponential exponential(Vector x) {
  constexpr float LOG2_E = SIGN * 1.44269504f;
  x = SIGN > 0 ? min(all(88.f), max(all(-87.f), x)) : min(all(87.f), max(all(-88.f), x));
  // Adding 1.5 * 2^23 rounds to an integer, and adding the exponent's bias too leaves 2^n's bits at the low end.
  constexpr float SHIFT = 12582912.f + 127.f;
  const Vector shifted = x * LOG2_E + SHIFT;
  const Vector n = shifted - SHIFT;
  return {power_of_fraction(x * LOG2_E - n), (Vector)((Bits)shifted << 23)};
}

INLINE Vector exp(Vector x) {
  const Exponential e = exponential<1>(x);
  return e.fraction * e.power;
}

INLINE Vector sigmoid(Vector x) {
  const Exponential e = exponential<-1>(x);
  return 1.f / (e.fraction * e.power + 1.f);
}

// ------------------------------------------------------------------------------------------------------- permutations

// Rule::at(i) says where lane i comes from: 0 and up in a, LANES and up in b.
template <class Rule, int... I>
INLINE Vector shuffle(Vector a, Vector b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Rule::at(I)...);
#else
  return __builtin_shuffle(a, b, Integers{Rule::at(I)...});
#endif
}

template <class Rule>
INLINE Vector shuffle(Vector a, Vector b) {
  return shuffle<Rule>(a, b, std::make_integer_sequence<int, LANES>());
}

// Elements of even (odd) place within each 128 bits: two of a, then two of b.
template <int ODD>
struct Alternate {
  static constexpr int at(int i) { return i / 4 * 4 + 2 * (i % 2) + ODD + (i % 4 < 2 ? 0 : LANES); }
};

// The first (second) two elements of each 128 bits, one of a and one of b in turn.
template <int SECOND>
struct InterleaveOnes {
  static constexpr int at(int i) { return i / 4 * 4 + 2 * SECOND + i % 4 / 2 + (i % 2 ? LANES : 0); }
};

// The first (second) two elements of each 128 bits of a, then those of b.
template <int SECOND>
struct InterleaveTwos {
  static constexpr int at(int i) { return i / 4 * 4 + 2 * SECOND + i % 2 + (i % 4 < 2 ? 0 : LANES); }
};

// Every other 128 bits, from the first (second) on: those of a, then those of b.
template <int ODD>
struct Quarters {
  static constexpr int at(int i) {
    return 4 * (2 * (i / 4) + ODD) + i % 4;  // b goes on where a ends
  }
};

// Lane i of the result is the sum over the lanes of x[i]; x is used up.
INLINE Vector sums(Vector *x) {
  for (int i = 0; i < LANES / 2; i++)
    x[i] = shuffle<Alternate<0>>(x[2 * i], x[2 * i + 1]) + shuffle<Alternate<1>>(x[2 * i], x[2 * i + 1]);
  for (int i = 0; i < LANES / 4; i++)
    x[i] = shuffle<Alternate<0>>(x[2 * i], x[2 * i + 1]) + shuffle<Alternate<1>>(x[2 * i], x[2 * i + 1]);
  for (int count = LANES / 8; count; count /= 2)
    for (int i = 0; i < count; i++)
      x[i] = shuffle<Quarters<0>>(x[2 * i], x[2 * i + 1]) + shuffle<Quarters<1>>(x[2 * i], x[2 * i + 1]);
  return x[0];
}

INLINE float sum(Vector x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

// Transpose the LANES x LANES matrix of rows x, in place.
INLINE void transpose(Vector *x) {
  for (int i = 0; i < LANES; i += 4) {
    const Vector a = shuffle<InterleaveOnes<0>>(x[i], x[i + 1]), b = shuffle<InterleaveOnes<1>>(x[i], x[i + 1]);
    const Vector c = shuffle<InterleaveOnes<0>>(x[i + 2], x[i + 3]), d = shuffle<InterleaveOnes<1>>(x[i + 2], x[i + 3]);
    x[i] = shuffle<InterleaveTwos<0>>(a, c), x[i + 1] = shuffle<InterleaveTwos<1>>(a, c);
    x[i + 2] = shuffle<InterleaveTwos<0>>(b, d), x[i + 3] = shuffle<InterleaveTwos<1>>(b, d);
  }
  // Each 128 bits are transposed in themselves; now they change places.
  if (LANES == 8)
    for (int i = 0; i < 4; i++) {
      const Vector a = x[i], b = x[i + 4];
      x[i] = shuffle<Quarters<0>>(a, b), x[i + 4] = shuffle<Quarters<1>>(a, b);
    }
  if (LANES == 16)
    for (int i = 0; i < 4; i++) {
      const Vector a = shuffle<Quarters<0>>(x[i], x[i + 4]), b = shuffle<Quarters<1>>(x[i], x[i + 4]);
      const Vector c = shuffle<Quarters<0>>(x[i + 8], x[i + 12]), d = shuffle<Quarters<1>>(x[i + 8], x[i + 12]);
      x[i] = shuffle<Quarters<0>>(a, c), x[i + 4] = shuffle<Quarters<0>>(b, d);
      x[i + 8] = shuffle<Quarters<1>>(a, c), x[i + 12] = shuffle<Quarters<1>>(b, d);
    }
}

}  // namespace
