// The causal form where one pass for each head will not do: heads compete with each other, or threads outnumber heads
// and sequences are cut into pieces. Each stage runs over all pieces at once, and what it gathers is summed along the
// pieces before the next.
#pragma once

#include "causal_runs.h"

namespace {

template <class T, int KEYS>
struct CausalPieces : CausalRun<T, KEYS> {
  using Run = CausalRun<T, KEYS>;
  using Run::call, Run::keys, Run::values, Run::matrix, Run::failed, Run::heads, Run::tokens;
  bool gradients = false;

  explicit CausalPieces(const FlowCall &call) : Run(call) {}

  // What a piece starts from: the past before it, and what later pieces want of it.
  struct Piece {
    Past past;
    double log_kept, kept;  // of what lies before, at its end
    double *memory;
    Future future;
    double *growth;

    Piece(const CausalPieces &run, Scratch &scratch)
        : past(run.keys, scratch),
          log_kept(0),
          kept(1),
          memory(scratch.take<double>(run.matrix)),
          future(run.keys, scratch),
          growth(scratch.take<double>(run.gradients ? run.matrix : 0)) {}
  };

  // Everything that outlives a task.
  struct Together {
    CausalPieces *run;
    int64_t pieces;
    Piece *piece;      // of every piece of every head
    float **flows;     // of every head, for competition over heads: O^, then weights, of every token
    double *counts;    // of every head, of the token in hand
    Records *records;  // of every head
    Stage stage;
    BackwardStage backward_stage;
    bool recompute;
  };

  int64_t pieces() const {
    int64_t longest = 0;
    for (int64_t s = 0; s < call.sequences; s++) longest = tokens(s) > longest ? tokens(s) : longest;
    return pieces_of_heads(call, longest);
  }

  bool wanted() const { return pieces() > 1 || call.competition == HEADS; }

  void run_together(bool backward) {
    gradients = backward;
    if (!with_scratch([&](Scratch &scratch, bool real) { lay_out(scratch, real); })) failed = true;
  }

  void lay_out(Scratch &scratch, bool real) {
    Together all{};
    all.run = this, all.pieces = pieces();
    all.piece = scratch.take<Piece>(heads() * all.pieces);
    all.flows = scratch.take<float *>(heads());
    all.counts = scratch.take<double>(heads());
    all.records = scratch.take<Records>(gradients ? heads() : 0);
    for (int64_t index = 0; index < heads(); index++) {
      const int64_t length = tokens(index / call.heads);
      float *flows = call.competition == HEADS ? scratch.take<float>(length + CHUNK) : nullptr;
      if (real) all.flows[index] = flows;
      if (gradients) {
        const Records records(call, length, keys, this->matrix, scratch);
        if (real) new (all.records + index) Records(records);
      }
      for (int64_t p = 0; p < all.pieces; p++) {
        const Piece piece(*this, scratch);
        if (real) clear(*new (all.piece + index * all.pieces + p) Piece(piece));
      }
    }
    if (!real) return;
    forward_stages(all);
    if (gradients)
      backward_stages(all);
    else
      forward_stage(all, OUTPUT);
  }

  void clear(Piece &piece) const {
    for (int i = 0; i < 4; i++) {
      memset(piece.past.sums[i], 0, sizeof(double) * keys);
      memset(piece.future.sums[i], 0, sizeof(double) * keys);
    }
    piece.past.largest = LOG_ZERO, piece.past.total = piece.past.count = 0;
    piece.future.normaliser = piece.future.count = 0;
    memset(piece.memory, 0, sizeof(double) * matrix);
    if (gradients) memset(piece.growth, 0, sizeof(double) * matrix);
  }

  int64_t first(int64_t sequence, int64_t piece, int64_t count) const {
    return piece_start(tokens(sequence), piece, count);
  }

  // -------------------------------------------------------------------------------------------------------------
  // forward

  // The past of every piece, and for competition over heads the weights.
  void forward_stages(Together &all) {
    for (int64_t index = 0; index < heads(); index++) begin_at(all.piece[index * all.pieces], index);
    for (Stage stage : {FEATURES, WEIGHTED, COMPETITION, MEMORY}) {
      const bool for_heads = stage == COMPETITION && call.competition == HEADS;
      if (all.pieces > 1 || for_heads) forward_stage(all, stage);
      if (for_heads)
        for (int64_t s = 0; s < call.sequences; s++) weigh_heads(s, all);
    }
  }

  void forward_stage(Together &all, Stage stage) {
    all.stage = stage;
    run_tasks(
        heads() * all.pieces, call.threads,
        [](void *context, int64_t task, int) {
          const Together &all = *static_cast<Together *>(context);
          if (!with_scratch([&](Scratch &scratch, bool real) { all.run->forward_piece(task, all, scratch, real); }))
            all.run->failed = true;
        },
        &all);
    if (all.pieces > 1 && stage != OUTPUT)
      for (int64_t index = 0; index < heads(); index++) carry(index, all, stage);
  }

  // The first piece goes on from the past. The others gather their own part of what the stage is for, from nothing,
  // until carry() has given them the past too.
  void forward_piece(int64_t task, const Together &all, Scratch &scratch, bool real) {
    const WithoutDenormals guard(call.log_decay.data);
    Causal<T, KEYS> worker(call, scratch);
    Past past(keys, scratch);
    Memory memory(call.key_channels, call.value_channels, keys, values, scratch);
    double *sum = scratch.take<double>(matrix);
    if (!real) return;
    const int64_t index = task / all.pieces, p = task % all.pieces, sequence = index / call.heads;
    const int64_t begin = first(sequence, p, all.pieces), end = first(sequence, p + 1, all.pieces);
    Piece &piece = all.piece[task];
    worker.prepare();
    worker.past = &past;
    copy(past, piece.past);
    memcpy(sum, piece.memory, sizeof(double) * matrix);
    if (all.stage >= MEMORY) memory.start(sum);
    for (int64_t at = begin; at < end; at += CHUNK) {
      const typename Causal<T, KEYS>::Place place(call, sequence, index % call.heads, at, end);
      const typename Causal<T, KEYS>::Place next(call, sequence, index % call.heads, at + CHUNK, end);
      worker.chunk(place, next, all.stage, memory, all.flows[index]);
    }
    if (all.stage >= MEMORY) memory.flush();
    if (all.stage == OUTPUT) {
      if (p + 1 < all.pieces) return;
      this->write_past(past, index);
      memcpy(call.after.memory + index * matrix, sum, sizeof(double) * matrix);
      return;
    }
    if (all.pieces == 1) return;
    gathered(piece, past, sum, all.stage);
  }

  void copy(Past &to, const Past &from) const {
    for (int i = 0; i < 4; i++) memcpy(to.sums[i], from.sums[i], sizeof(double) * keys);
    to.largest = from.largest, to.total = from.total;
    to.count = from.count, to.log_kept = 0;
  }

  // Keep what a stage is for.
  void gathered(Piece &piece, Past &past, double *sum, Stage stage) const {
    for (int i = 0; i < 4; i++)
      if (stage == (i < 2 ? FEATURES : WEIGHTED)) memcpy(piece.past.sums[i], past.sums[i], sizeof(double) * keys);
    if (stage == FEATURES) {
      piece.past.count = past.count;
      piece.log_kept = past.log_kept, piece.kept = std::exp(past.log_kept);
    }
    if (stage == COMPETITION) piece.past.largest = past.largest, piece.past.total = past.total;
    if (stage == MEMORY) memcpy(piece.memory, sum, sizeof(double) * matrix);
  }

  void begin_at(Piece &piece, int64_t index) const {
    this->read_past(piece.past, index);
    copy_or_zero(piece.memory, call.before.memory ? call.before.memory + index * matrix : nullptr, matrix);
  }

  // From what each piece gathered in a stage to what lies before each.
  void carry(int64_t index, Together &all, Stage stage) const {
    Piece *piece = all.piece + index * all.pieces;
    const auto kept = [&](int64_t p) { return piece[p].kept; };
    for (int i = 0; i < 4; i++)
      if (stage == (i < 2 ? FEATURES : WEIGHTED))
        carry_forward(keys, all.pieces, [&](int64_t p) { return piece[p].past.sums[i]; }, kept);
    if (stage == FEATURES) carry_forward(1, all.pieces, [&](int64_t p) { return &piece[p].past.count; }, kept);
    if (stage == MEMORY) carry_forward(matrix, all.pieces, [&](int64_t p) { return piece[p].memory; }, kept);
    if (stage == COMPETITION) {
      Past sum = piece[0].past;
      for (int64_t p = 1; p < all.pieces; p++) {
        const Past own = piece[p].past;
        piece[p].past.largest = sum.largest, piece[p].past.total = sum.total;
        sum.largest += piece[p].log_kept;
        const double largest = sum.largest > own.largest ? sum.largest : own.largest;
        sum.total = sum.total * std::exp(sum.largest - largest) + own.total * std::exp(own.largest - largest);
        sum.largest = largest;
      }
    }
    begin_at(piece[0], index);
  }

  // of(p)[x] becomes the sum of of(0)[x] to of(p - 1)[x], each times what the pieces between keep of it.
  template <class Of, class Kept>
  static void carry_forward(int64_t count, int64_t pieces, Of of, Kept kept) {
    for (int64_t x = 0; x < count; x++) {
      double sum = of(0)[x];
      for (int64_t p = 1; p < pieces; p++) {
        const double own = of(p)[x];
        of(p)[x] = sum;
        sum = sum * kept(p) + own;
      }
    }
  }

  // O^ of every head to weights.
  void weigh_heads(int64_t sequence, Together &all) const {
    const int64_t first = sequence * call.heads;
    float **flows = all.flows + first;
    double *counts = all.counts + first;
    for (int64_t h = 0; h < call.heads; h++) counts[h] = this->before(first + h);
    for (int64_t t = 0; t < tokens(sequence); t++) {
      for (int64_t h = 0; h < call.heads; h++) {
        const auto log_decay = rows_of<const float>(call.log_decay, call.sinks, sequence, h);
        counts[h] = (log_decay.first ? counts[h] * decay_of(*log_decay.at(t)) : counts[h]) + 1.;
      }
      softmax_over_heads(
          call.heads, [&](int64_t h) { return counts[h]; }, [&](int64_t h) -> float & { return flows[h][t]; });
    }
  }

  // ------------------------------------------------------------------------------------------------------------
  // backward

  void backward_stages(Together &all) {
    for (int64_t index = 0; index < heads(); index++) end_at(all.piece[(index + 1) * all.pieces - 1], index);
    all.recompute = true;
    backward_stage(all, INPUTS);
    all.recompute = false;
    if (all.pieces > 1) backward_stage(all, GRAD_MEMORY);
    backward_stage(all, PRODUCTS);
    for (int64_t s = 0; s < call.sequences; s++) grad_competition(s, all);
    if (all.pieces > 1) backward_stage(all, GRAD_WEIGHTED), backward_stage(all, GRAD_FEATURES);
    backward_stage(all, INPUTS);
    for (int64_t index = 0; index < heads(); index++) finish_counts(index, all);
  }

  void finish_counts(int64_t index, Together &all) const {
    Future last = all.piece[(index + 1) * all.pieces - 1].future;
    this->finish_decay(last, index, all.records[index]);
    call.grad_before.count[index] = last.count;
  }

  // The last piece starts from what is wanted of the last state.
  void end_at(Piece &piece, int64_t index) const { this->read_future(piece.future, piece.growth, index); }

  void backward_stage(Together &all, BackwardStage stage) {
    all.backward_stage = stage;
    run_tasks(
        heads() * all.pieces, call.threads,
        [](void *context, int64_t task, int) {
          const Together &all = *static_cast<Together *>(context);
          if (!with_scratch([&](Scratch &scratch, bool real) { all.run->backward_piece(task, all, scratch, real); }))
            all.run->failed = true;
        },
        &all);
    if (all.pieces == 1 || all.recompute || stage == PRODUCTS || stage == INPUTS) return;
    for (int64_t index = 0; index < heads(); index++) carry_back(index, all, stage);
  }

  void backward_piece(int64_t task, const Together &all, Scratch &scratch, bool real) {
    const WithoutDenormals guard(call.log_decay.data);
    CausalBackward<T, KEYS> worker(call, scratch);
    Past past(keys, scratch);
    Future future(keys, scratch);
    Memory memory(call.value_channels, call.key_channels, values, keys, scratch);
    Memory growth(call.key_channels, call.value_channels, keys, values, scratch);
    double *sum = scratch.take<double>(matrix);
    if (!real) return;
    const int64_t index = task / all.pieces, p = task % all.pieces, sequence = index / call.heads;
    const int64_t head = index % call.heads, begin = first(sequence, p, all.pieces);
    const int64_t end = first(sequence, p + 1, all.pieces);
    const Piece &piece = all.piece[task];
    worker.prepare();
    worker.past = &past;
    if (all.recompute) {
      copy(past, piece.past);
      memory.across = true;
      memcpy(sum, piece.memory, sizeof(double) * matrix);
      memory.start(sum);
      return worker.recompute(sequence, head, begin, end, memory, all.records[index], all.flows[index]);
    }
    for (int i = 0; i < 4; i++) memcpy(future.sums[i], piece.future.sums[i], sizeof(double) * keys);
    future.normaliser = piece.future.normaliser, future.count = 0;
    memcpy(sum, piece.growth, sizeof(double) * matrix);
    growth.start(sum);
    worker.against_time(sequence, head, begin, end, all.backward_stage, true, growth, future, all.records[index],
                        this->before(index));
    growth.flush();
    found(task, all, future, sum);
  }

  void found(int64_t task, const Together &all, const Future &future, const double *sum) const {
    Piece &piece = all.piece[task];
    const int64_t index = task / all.pieces;
    const BackwardStage stage = all.backward_stage;
    if (stage == GRAD_MEMORY) memcpy(piece.growth, sum, sizeof(double) * matrix);
    for (int i = 0; i < 4; i++)
      if (stage == (i < 2 ? GRAD_FEATURES : GRAD_WEIGHTED))
        memcpy(piece.future.sums[i], future.sums[i], sizeof(double) * keys);
    if (task % all.pieces) return;
    if (stage == PRODUCTS) memcpy(call.grad_before.memory + index * matrix, sum, sizeof(double) * matrix);
    if (stage != INPUTS) return;
    const double of_normaliser = call.grad_before.log_normaliser[index];  // grad_competition() has written it
    this->write_future(future, index);
    call.grad_before.log_normaliser[index] = of_normaliser;
  }

  // From what each piece gathered to what lies after each.
  void carry_back(int64_t index, Together &all, BackwardStage stage) const {
    Piece *piece = all.piece + index * all.pieces;
    const int64_t last = all.pieces - 1;
    const auto kept = [&](int64_t p) { return piece[last - p].kept; };
    for (int i = 0; i < 4; i++)
      if (stage == (i < 2 ? GRAD_FEATURES : GRAD_WEIGHTED))
        carry_forward(keys, all.pieces, [&](int64_t p) { return piece[last - p].future.sums[i]; }, kept);
    if (stage == GRAD_MEMORY)
      carry_forward(matrix, all.pieces, [&](int64_t p) { return piece[last - p].growth; }, kept);
    end_at(piece[last], index);
  }

  // d w of every token and head to d O^.
  void grad_competition(int64_t sequence, Together &all) const {
    const Records *records = all.records + sequence * call.heads;
    const int64_t length = tokens(sequence);
    const int64_t first = sequence * call.heads;
    for (int64_t h = 0; h < call.heads; h++) {
      const int64_t index = first + h;
      double of_normaliser = call.grad_after.log_normaliser ? call.grad_after.log_normaliser[index] : 0.;
      if (call.competition == SEQUENCE)
        of_normaliser = CausalBackward<T, KEYS>::normalise(0, length, this->before(index), of_normaliser, records[h]);
      call.grad_before.log_normaliser[index] = of_normaliser;
    }
    if (call.competition != HEADS) return;
    for (int64_t t = 0; t < length; t++) {
      const auto count = [&](int64_t h) {
        return records[h].decays ? records[h].past_count[t] + 1. : this->before(first + h) + t + 1;
      };
      for (int64_t h = 0; records->wanted && h < call.heads; h++)
        records[h].grad_count[t] += (float)(records[h].share[t] * records[h].grad_flow[t] / count(h));
      softmax_gradient(
          call.heads, count, [&](int64_t h) -> float & { return records[h].share[t]; },
          [&](int64_t h) -> float & { return records[h].grad_flow[t]; });
    }
  }
};

}  // namespace
