// AFT-simple: y_t = sigmoid(q_t) mu_t in every channel, mu_t being the mean of the values under exp(k), of all of them
// or of those up to t. The derivatives of the causal form, with b_t = sum exp(k_j) up to t, p_t = exp(k_t) / b_t, and
// h_t = g_t sigmoid(q_t) of what comes back, are
//
//   d v_j = exp(k_j) T_j,                              T_j = sum over t >= j of h_t / b_t
//   d k_j = exp(k_j) ((v_j - mu_j) T_j - W_j),         W_j = sum over t > j of (mu_t - mu_(t-1)) T_t
//   d q_t = g_t mu_t sigmoid'(q_t)
//
// Steps of the mean, mu_t - mu_(t-1) = p_t d_t and v_t - mu_t = (1 - p_t) d_t with d_t = v_t - mu_(t-1), and 1 - p_t =
// b_(t-1) / b_t: so nothing cancels where one key outweighs the others, as it would in v_j T_j - sum h_t mu_t / b_t. A
// final state is one more query: its h is d mean, and d log_weight is taken off W. An initial one is one more key.
#pragma once

#include "aft_sums.h"

namespace {

// Channels of one sequence, which a task takes through all tokens.
struct Block {
  int64_t sequence, first;
  int count;
};

// What the tasks of all passes have.
template <class T>
struct AftTask {
  const AftCall &call;
  const Block block;
  const int width;  // padded
  KeySums past;

  AftTask(const AftCall &call, const Block &block, Scratch &scratch)
      : call(call), block(block), width(padded(block.count)), past(block.count, scratch) {}

  template <class E>
  Rows<E> rows(const View &view) const {
    return {static_cast<E *>(view.data) + block.sequence * view.batch + block.first, view.length, nullptr};
  }

  const uint8_t *mask(const uint8_t *of_all, int64_t tokens) const {
    return of_all ? of_all + block.sequence * tokens : nullptr;
  }

  template <class E>
  E *state(E *of_all) const {
    return of_all ? of_all + block.sequence * call.channels + block.first : nullptr;
  }

  float *mark(int64_t index, int64_t count) const {
    return call.marks + (block.sequence * count + index) * 3 * call.channels + block.first;
  }

  void zero(T *row) const { memset(row, 0, sizeof(T) * block.count); }

  inline __attribute__((always_inline)) Vector part(const T *row, int x) const {
    return load_part(row, block.count, x);
  }

  inline __attribute__((always_inline)) void put(T *row, int x, Vector y) const { store_part(row, block.count, x, y); }

  // body(first, last) for every run of tokens, in their order.
  template <class Body>
  void each_run(int64_t tokens, Body body) const {
    for (int64_t at = 0; at < tokens; at += call.run) body(at, at + call.run < tokens ? at + call.run : tokens);
  }
};

// ------------------------------------------------------------------------------------------------------------- causal

template <class T>
struct CausalMeans : AftTask<T> {
  using Base = AftTask<T>;
  using Base::call, Base::past, Base::block, Base::width;
  static constexpr int WIDEST = 512;  // channels whose sums stay in the first cache

  CausalMeans(const AftCall &call, const Block &block, Scratch &scratch) : Base(call, block, scratch) {}

  void run() {
    const int64_t marks = (call.keys + call.run - 1) / call.run + 1;
    past.start(this->state(call.log_weight), this->state(call.mean));
    this->each_run(call.keys, [&](int64_t first, int64_t last) {
      past.write_mark(this->mark(first / call.run, marks), call.channels);
      means(first, last);
      past.flush();
    });
    past.write_mark(this->mark(marks - 1, marks), call.channels);
    past.finish(this->state(call.log_weight_after), this->state(call.mean_after));
  }

  void means(int64_t first, int64_t last) const {
    const Rows<const T> q = this->template rows<const T>(call.q), k = this->template rows<const T>(call.k);
    const Rows<const T> v = this->template rows<const T>(call.v);
    const Rows<T> out = this->template rows<T>(call.out);
    const uint8_t *real = this->mask(call.key_mask, call.keys);
    const KeySums past = this->past;  // of which the compiler knows that no store changes it
    for (int64_t t = first; t < last; t++) {
      if (real && !real[t]) {
        this->zero(out.at(t));
        continue;
      }
      for (int x = 0; x < width; x += LANES) {
        const Vector weight = past.weigh(x, this->part(k.at(t), x), [](Vector) {});
        past.weight.add(x, weight), past.weighted.add(x, weight * this->part(v.at(t), x));
        const Vector mean = past.weighted.now(x) / past.weight.now(x);
        this->put(out.at(t), x, mean * sigmoid(this->part(q.at(t), x)));
      }
    }
  }
};

template <class T>
struct CausalGradients : AftTask<T> {
  using Base = AftTask<T>;
  using Base::call, Base::past, Base::block, Base::width;
  static constexpr int WIDEST = 512;  // channels of which a run stays in the second cache
  RunningSum shares, steps;           // T and W
  float *mean_before;                 // mu of the token before
  // Of the tokens of a run, (tokens, width): exp(k), 1 / b, mu, v - mu, and what mu has grown by.
  float *weight, *inverse, *mean, *apart, *step;
  float *factor;  // what the past was multiplied by at each token
  bool *rose;     // which tokens have a factor

  CausalGradients(const AftCall &call, const Block &block, Scratch &scratch)
      : Base(call, block, scratch), shares(width, scratch), steps(width, scratch) {
    mean_before = scratch.take<float>(width);
    for (float **rows : {&weight, &inverse, &mean, &apart, &step, &factor})
      *rows = scratch.take<float>(call.run * width);
    rose = scratch.take<bool>(call.run);
  }

  void run() {
    const int64_t runs = (call.keys + call.run - 1) / call.run;
    start(this->mark(runs, runs + 1));
    for (int64_t index = runs; index-- > 0;) {
      const int64_t first = index * call.run, last = first + call.run < call.keys ? first + call.run : call.keys;
      past.read_mark(this->mark(index, runs + 1), call.channels);
      past.means(mean_before);
      recompute(first, last);
      against_time(first, last);
      for (int x = 0; x < width; x += LANES) shares.flush(x), steps.flush(x);
    }
    finish(this->mark(0, runs + 1));
  }

  // What the final state wants.
  void start(const float *mark) const {
    const double *of_log_weight = this->state(call.grad_log_weight_after);
    const double *of_mean = this->state(call.grad_mean_after);
    for (int c = 0; c < width; c++) {
      const double b = c < block.count ? mark[2 * call.channels + c] : 0.;
      shares.start(c, b != 0. && of_mean ? of_mean[c] / b : 0.);
      steps.start(c, b != 0. && of_log_weight ? -of_log_weight[c] / b : 0.);
    }
  }

  // What reaches the initial state: a key of weight b, and of the value that is its mean.
  void finish(const float *mark) const {
    for (int c = 0; c < block.count; c++) {
      const double b = mark[2 * call.channels + c];
      this->state(call.grad_mean)[c] = b * shares.total[c];
      this->state(call.grad_log_weight)[c] = -b * steps.total[c];
    }
  }

  // The sums of a run again.
  void recompute(int64_t first, int64_t last) const {
    const Rows<const T> k = this->template rows<const T>(call.k), v = this->template rows<const T>(call.v);
    const uint8_t *real = this->mask(call.key_mask, call.keys);
    const CausalGradients self = *this;  // of which the compiler knows that no store changes it
    const KeySums &past = self.past;
    for (int64_t t = first; t < last; t++) {
      const int64_t row = (t - first) * width;
      rose[t - first] = false;
      if (real && !real[t]) continue;
      for (int x = 0; x < self.width; x += LANES) {
        const Vector value = this->part(v.at(t), x), off = value - load(self.mean_before + x);
        const Vector one = past.weigh(x, this->part(k.at(t), x), [&](Vector f) { keep_factor(t - first, x, f); });
        const Vector b_before = past.weight.now(x);
        past.weight.add(x, one), past.weighted.add(x, one * value);
        const Vector inverse_now = 1.f / past.weight.now(x), mean_now = past.weighted.now(x) * inverse_now;
        store(self.weight + row + x, one), store(self.inverse + row + x, inverse_now);
        store(self.mean + row + x, mean_now), store(self.mean_before + x, mean_now);
        store(self.apart + row + x, b_before * inverse_now * off), store(self.step + row + x, one * inverse_now * off);
      }
    }
  }

  void keep_factor(int64_t token, int x, Vector f) const {
    float *row = factor + token * width;
    if (!rose[token])
      for (int c = 0; c < width; c += LANES) store(row + c, all(1.f));
    rose[token] = true;
    store(row + x, f);
  }

  void against_time(int64_t first, int64_t last) const {
    const Rows<const T> q = this->template rows<const T>(call.q);
    const Rows<const T> upstream = this->template rows<const T>(call.grad_out);
    const Rows<T> grad_q = this->template rows<T>(call.grad_q), grad_k = this->template rows<T>(call.grad_k);
    const Rows<T> grad_v = this->template rows<T>(call.grad_v);
    const uint8_t *real = this->mask(call.key_mask, call.keys);
    const CausalGradients self = *this;
    for (int64_t t = last; t-- > first;) {
      if (real && !real[t]) {
        this->zero(grad_q.at(t)), this->zero(grad_k.at(t)), this->zero(grad_v.at(t));
        continue;
      }
      const int64_t row = (t - first) * width;
      for (int x = 0; x < self.width; x += LANES) {
        const Vector weight = load(self.weight + row + x);
        const Vector gate = sigmoid(this->part(q.at(t), x)), h = gate * this->part(upstream.at(t), x);
        self.shares.add(x, h * load(self.inverse + row + x));
        const Vector share = self.shares.now(x);
        this->put(grad_q.at(t), x, h * load(self.mean + row + x) * (1.f - gate));
        this->put(grad_k.at(t), x, weight * (load(self.apart + row + x) * share - self.steps.now(x)));
        this->put(grad_v.at(t), x, weight * share);
        self.steps.add(x, load(self.step + row + x) * share);
      }
      if (rose[t - first]) fall(factor + row);
    }
  }

  // Back over a rise of the scale.
  void fall(const float *row) const {
    for (int x = 0; x < width; x += LANES) shares.scale(x, load(row + x)), steps.scale(x, load(row + x));
  }
};

// ------------------------------------------------------------------------------------------------------ bidirectional

template <class T>
struct OneMean : AftTask<T> {
  using Base = AftTask<T>;
  using Base::call, Base::past, Base::block, Base::width;
  static constexpr int WIDEST = 512;
  float *mean;

  OneMean(const AftCall &call, const Block &block, Scratch &scratch)
      : Base(call, block, scratch), mean(scratch.take<float>(width)) {}

  void run() {
    past.start(nullptr, nullptr);
    this->each_run(call.keys, [&](int64_t first, int64_t last) {
      gather(first, last);
      past.flush();
    });
    past.write_mark(this->mark(0, 1), call.channels);
    past.means(mean);
    put_out();
  }

  void gather(int64_t first, int64_t last) const {
    const Rows<const T> k = this->template rows<const T>(call.k), v = this->template rows<const T>(call.v);
    const uint8_t *real = this->mask(call.key_mask, call.keys);
    const KeySums past = this->past;
    for (int64_t t = first; t < last; t++) {
      if (real && !real[t]) continue;
      for (int x = 0; x < width; x += LANES) {
        const Vector weight = past.weigh(x, this->part(k.at(t), x), [](Vector) {});
        past.weight.add(x, weight), past.weighted.add(x, weight * this->part(v.at(t), x));
      }
    }
  }

  void put_out() const {
    const Rows<const T> q = this->template rows<const T>(call.q);
    const Rows<T> out = this->template rows<T>(call.out);
    const uint8_t *real = this->mask(call.query_mask, call.queries);
    for (int64_t t = 0; t < call.queries; t++) {
      if (real && !real[t]) {
        this->zero(out.at(t));
        continue;
      }
      for (int x = 0; x < width; x += LANES) this->put(out.at(t), x, load(mean + x) * sigmoid(this->part(q.at(t), x)));
    }
  }
};

template <class T>
struct OneMeanGradients : AftTask<T> {
  using Base = AftTask<T>;
  using Base::call, Base::past, Base::block, Base::width;
  static constexpr int WIDEST = 512;
  RunningSum sum;       // of h
  float *mean, *share;  // mu, T

  OneMeanGradients(const AftCall &call, const Block &block, Scratch &scratch)
      : Base(call, block, scratch),
        sum(width, scratch),
        mean(scratch.take<float>(width)),
        share(scratch.take<float>(width)) {}

  void run() {
    past.read_mark(this->mark(0, 1), call.channels);
    past.means(mean);
    for (int c = 0; c < width; c++) sum.start(c, 0.);
    this->each_run(call.queries, [&](int64_t first, int64_t last) {
      of_queries(first, last);
      for (int x = 0; x < width; x += LANES) sum.flush(x);
    });
    for (int c = 0; c < width; c++) {
      const double b = past.weight.total[c];
      share[c] = b != 0. ? (float)(sum.total[c] / b) : 0.f;
    }
    of_keys();
  }

  void of_queries(int64_t first, int64_t last) const {
    const Rows<const T> q = this->template rows<const T>(call.q);
    const Rows<const T> upstream = this->template rows<const T>(call.grad_out);
    const Rows<T> grad_q = this->template rows<T>(call.grad_q);
    const uint8_t *real = this->mask(call.query_mask, call.queries);
    const OneMeanGradients self = *this;
    for (int64_t t = first; t < last; t++) {
      if (real && !real[t]) {
        this->zero(grad_q.at(t));
        continue;
      }
      for (int x = 0; x < self.width; x += LANES) {
        const Vector gate = sigmoid(this->part(q.at(t), x)), h = gate * this->part(upstream.at(t), x);
        self.sum.add(x, h);
        this->put(grad_q.at(t), x, h * load(self.mean + x) * (1.f - gate));
      }
    }
  }

  void of_keys() const {
    const Rows<const T> k = this->template rows<const T>(call.k), v = this->template rows<const T>(call.v);
    const Rows<T> grad_k = this->template rows<T>(call.grad_k), grad_v = this->template rows<T>(call.grad_v);
    const uint8_t *real = this->mask(call.key_mask, call.keys);
    const OneMeanGradients self = *this;
    for (int64_t t = 0; t < call.keys; t++) {
      if (real && !real[t]) {
        this->zero(grad_k.at(t)), this->zero(grad_v.at(t));
        continue;
      }
      for (int x = 0; x < self.width; x += LANES) {
        const Vector of_value = exp(this->part(k.at(t), x) - load(self.past.scale + x)) * load(self.share + x);
        this->put(grad_k.at(t), x, of_value * (this->part(v.at(t), x) - load(self.mean + x)));
        this->put(grad_v.at(t), x, of_value);
      }
    }
  }
};

}  // namespace
