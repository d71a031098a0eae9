// The gated FFN: a predictor's first matrix, gates, bundles, and the sum of the pieces' partial
// sums.

#include <algorithm>

#include "session/input.h"
#include "session/prefetch.h"
#include "session/stages.h"

namespace hybrid {

namespace {

// Predictors' other inputs than the operation's, for all tokens. Those of even layers and those of
// odd layers have a place each, so that a layer can read those of the layer before.
uint8_t* OtherInputs(const Pass& pass, int32_t layer) {
  return pass.scratch.other_inputs +
         layer % 2 * int64_t{kPrefillChunk} * VectorBytes(Format::kQ8, pass.shape().hidden_size);
}

// Writes what a token brings to predictors as another input: its residual stream, or h.
void MakeOtherInput(const Pass& pass, const Ffn& op, int32_t token, float* floats, uint8_t* out) {
  const ProgramShape& shape = pass.shape();
  const float* vector = pass.scratch.x + int64_t{token} * shape.hidden_size;
  if (op.predictor->input == PredictorInput::kPrevious) {
    pass.kernels->rms_norm(vector, op.norm, shape.hidden_size, shape.rms_norm_eps, 1.0f, floats);
    vector = floats;
  }
  pass.kernels->quantize(Format::kQ8, vector, shape.hidden_size, out);
}

// The layer whose other inputs a predictor takes.
int32_t LayerOfInput(const Ffn& op) {
  return op.predictor->input == PredictorInput::kPrevious && op.layer > 0 ? op.layer - 1 : op.layer;
}

// Decode's input of a predictor's first matrix.
const uint8_t* PredictedFrom(const Pass& pass, const Phase& phase, int32_t piece,
                             ThreadScratch& thread) {
  const Ffn& op = pass.program.op<Ffn>(phase);
  if (op.predictor->input == PredictorInput::kNormed) return NormOnce(pass, phase, op.norm, thread);
  float* floats = thread.floats.get();
  const bool is_kept = LayerOfInput(op) != op.layer;
  // What the next layer reads is not read in this phase, so one thread can write it.
  if (op.predictor->input == PredictorInput::kPrevious && piece == 0)
    MakeOtherInput(pass, op, 0, floats, OtherInputs(pass, op.layer));
  if (is_kept) return OtherInputs(pass, op.layer - 1);
  if (thread.other_serial != pass.Serial(phase)) {
    MakeOtherInput(pass, op, 0, floats, thread.other_input.get());
    thread.other_serial = pass.Serial(phase);
  }
  return thread.other_input.get();
}

// z of all tokens: one piece of the rows of a predictor's first matrix.
void Project(const Pass& pass, const FfnPredictor& predictor, int32_t piece, const uint8_t* inputs,
             ThreadScratch& thread) {
  const Rows& matrix = predictor.first;
  const bool takes_h = predictor.input == PredictorInput::kNormed;
  const int32_t first = piece * kPredictRows, last = std::min(first + kPredictRows, matrix.n_rows);
  float* z = pass.scratch.z.get();
  pass.kernels->gemm({predictor.format, matrix, first, last, inputs,
                      VectorBytes(takes_h ? pass.shape().format : predictor.format, matrix.n_cols),
                      pass.n_tokens, z + first, matrix.n_rows});
  Read(pass, thread, kStagePredict, (last - first) * RowBytes(matrix, predictor.format));
  if (!IsMlp(predictor.second)) return;
  for (int32_t t = 0; t < pass.n_tokens; ++t, z += matrix.n_rows)
    for (int32_t i = first; i < last; ++i) {
      if (predictor.biases != nullptr) z[i] += predictor.biases[i];
      z[i] = z[i] < 0.0f ? 0.0f : z[i];  // a NaN stays
    }
}

// The inputs of a predictor for all tokens. A thread makes them once per operation.
const uint8_t* PredictorInputsOnce(const Pass& pass, const Phase& phase, const Predictor& predictor,
                                   ThreadScratch& thread) {
  uint8_t* inputs = thread.predictor_inputs.get();
  if (thread.predictor_serial != pass.Serial(phase)) {
    const int64_t input_bytes = PredictorInputBytes(predictor);
    for (int32_t t = 0; t < pass.n_tokens; ++t) {
      const float* z = pass.scratch.z + int64_t{t} * predictor.rank;
      if (IsMlp(predictor))
        pass.kernels->quantize(Format::kQ8, z, predictor.rank, inputs + t * input_bytes);
      else
        pass.kernels->make_predictor_input(predictor, z, inputs + t * input_bytes);
    }
    thread.predictor_serial = pass.Serial(phase);
  }
  return inputs;
}

// Pieces begin at multiples of 8 neurons, so no two pieces write to the same byte of a mask.
void ObserveActive(const Pass& pass, const Ffn& op, const Active* active, int32_t n_listed) {
  const Observation& observation = *pass.observation;
  const int64_t n_bytes = CeilDiv(pass.program.n_neurons(), 8);
  uint8_t* masks =
      observation.masks + (op.layer * observation.n_tokens + pass.first_observed) * n_bytes;
  for (int32_t i = 0; i < n_listed; ++i) {
    const Active& pair = active[i];
    const uint8_t bit = pair.gate != 0.0f ? static_cast<uint8_t>(1 << pair.neuron % 8) : 0;
    masks[pair.token * n_bytes + pair.neuron / 8] |= bit;
  }
}

// Counts what the neurons of a computation were and what was read for them.
void Count(const Pass& pass, const Ffn& op, const SparseFfnArgs& args, const ActiveCounts& counts,
           ThreadScratch& thread) {
  const int32_t first = std::max(args.first, op.n_given());
  int64_t tiles = 0;
  if (args.predictor != nullptr && args.last > first)
    tiles = (CeilDiv(args.last, kPredictTile) - CeilDiv(first, kPredictTile)) *
            PredictTileBytes(*args.predictor);
  Read(pass, thread, kStageGate, tiles + counts.n_gate_rows * RowBytes(op.gate, args.format));
  Read(pass, thread, kStageUpDown,
       counts.n_bundles * (RowBytes(op.up, args.format) + RowBytes(op.down, args.format)));
  const size_t layer = static_cast<size_t>(op.layer);
  thread.counters.n_active[layer] += counts.n_active;
  thread.counters.n_predicted[layer] += counts.n_predicted;
}

// Partial sums of pieces [first_piece, end_piece), for all tokens.
void ComputePieces(const Pass& pass, const Phase& phase, int32_t first_piece, int32_t end_piece,
                   const uint8_t* x, ThreadScratch& thread) {
  const ProgramShape& shape = pass.shape();
  const Ffn& op = pass.program.op<Ffn>(phase);
  const int64_t stride = PartialStride(shape, pass.n_tokens);
  SparseFfnArgs args;
  args.format = shape.format;
  args.gate = op.gate;
  args.up = op.up;
  args.down = op.down;
  int32_t piece_ends[kFfnPieces];
  for (int32_t i = first_piece; i < end_piece; ++i)
    piece_ends[i - first_piece] = FirstNeuron(op, i + 1);
  args.first = FirstNeuron(op, first_piece);
  args.last = FirstNeuron(op, end_piece);
  args.n_pieces = end_piece - first_piece;
  args.piece_ends = piece_ends;
  args.given_gates = pass.exchange.gates;
  args.given_stride = pass.exchange.n_neurons;
  args.n_given = op.n_given();
  args.activation = op.activation;
  args.threshold = op.threshold;
  args.x = x;
  args.x_stride = VectorBytes(shape.format, shape.hidden_size);
  args.n_tokens = pass.n_tokens;
  args.out = pass.scratch.partials + PlaceOf(first_piece) * stride;
  args.piece_stride = (PlaceOf(first_piece + 1) - PlaceOf(first_piece)) * stride;
  args.out_stride = PaddedCols(shape.format, shape.hidden_size);
  args.computes_all = pass.is_dense;
  args.active = thread.active.get();
  if (op.predictor && !pass.is_dense) {
    const Predictor& predictor = op.predictor->second;
    args.predictor = &predictor;
    args.predictor_inputs = PredictorInputsOnce(pass, phase, predictor, thread);
    args.predictor_input_stride = PredictorInputBytes(predictor);
    args.predicted = thread.predicted.get();
  }
  const ActiveCounts counts = pass.kernels->find_active(args);
  thread.counters.Tick(kStageGate);
  if (pass.observation != nullptr) ObserveActive(pass, op, args.active, counts.n_listed);
  if (pass.n_tokens == 1) PrefetchNextNorm(pass, phase);
  pass.kernels->add_active(args, counts);
  Count(pass, op, args, counts, thread);
}

// Adds the partial sums of some places to a token's result: the residual stream or, if the FFN is
// split, what the other device receives.
void AddToResult(const Pass& pass, const Ffn& op, int32_t token, const float* partials,
                 int32_t n_places) {
  const ProgramShape& shape = pass.shape();
  const int64_t at = int64_t{token} * shape.hidden_size;
  float* result = op.split ? pass.exchange.y + at : pass.scratch.x + at;
  if (op.split) std::fill_n(result, shape.hidden_size, 0.0f);
  pass.kernels->add_partials(shape.format, partials, PartialStride(shape, pass.n_tokens), n_places,
                             shape.hidden_size, op.split ? 1.0f : op.scale, result);
}

// In decode, to be called when a piece's partial sum is done. The places form two halves, even and
// odd. The thread that brings the last partial sum of a half adds that half up. The thread that is
// second to do so adds both halves to the result. The order is that of AddToResult over all places,
// so every number of threads gives the same bits.
void AddPartial(const Pass& pass, const Ffn& op, int32_t piece) {
  const ProgramShape& shape = pass.shape();
  const int64_t stride = PartialStride(shape, 1);
  const int32_t half = PlaceOf(piece) % 2;
  Scratch::Arrived* n_arrived = pass.scratch.n_arrived;
  if (n_arrived[half].n.fetch_add(1, std::memory_order_acq_rel) + 1 < kFfnPieces / 2) return;
  n_arrived[half].n.store(0, std::memory_order_relaxed);
  float* sum = pass.scratch.partials + half * stride;
  pass.kernels->sum_partials(sum, 2 * stride, kFfnPieces / 2,
                             PaddedCols(shape.format, shape.hidden_size), sum);
  if (n_arrived[2].n.fetch_add(1, std::memory_order_acq_rel) == 0) return;
  n_arrived[2].n.store(0, std::memory_order_relaxed);
  AddToResult(pass, op, 0, pass.scratch.partials.get(), 2);
}

}  // namespace

void RunPredict(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const FfnPredictor& predictor = *pass.program.op<Ffn>(phase).predictor;
  Project(pass, predictor, piece, PredictedFrom(pass, phase, piece, thread), thread);
}

void RunPredictTokens(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const Ffn& op = pass.program.op<Ffn>(phase);
  const bool takes_h = op.predictor->input == PredictorInput::kNormed;
  Project(pass, *op.predictor, piece,
          takes_h ? pass.scratch.inputs.get() : OtherInputs(pass, LayerOfInput(op)), thread);
}

void RunFfnNormTokens(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  const int32_t hidden = pass.shape().hidden_size;
  const Ffn& op = pass.program.op<Ffn>(phase);
  const Observation* observation = pass.observation;
  const TokenRange tokens = TokensOf(pass, piece);
  for (int32_t t = tokens.first; t < tokens.last; ++t) {
    if (op.predictor && op.predictor->input != PredictorInput::kNormed)
      MakeOtherInput(pass, op, t, thread.floats.get(),
                     OtherInputs(pass, op.layer) + t * VectorBytes(Format::kQ8, hidden));
    const float* h = Norm(pass, op.norm, 1.0f, t, thread.floats.get(), InputOf(pass, t, hidden));
    if (observation == nullptr || observation->inputs == nullptr) continue;
    const int64_t row = op.layer * observation->n_tokens + pass.first_observed + t;
    pass.kernels->to_fp16(h, hidden, observation->inputs + row * hidden);
  }
}

// In decode a piece of the phase is a run of pieces of the FFN.
void RunFfn(const Pass& pass, const Phase& phase, int32_t run, ThreadScratch& thread) {
  const Ffn& op = pass.program.op<Ffn>(phase);
  const int32_t first_piece = pass.ffn_runs[static_cast<size_t>(run)],
                end_piece = pass.ffn_runs[static_cast<size_t>(run) + 1];
  const uint8_t* x = NormOnce(pass, phase, op.norm, thread);
  ComputePieces(pass, phase, first_piece, end_piece, x, thread);
  for (int32_t piece = first_piece; piece < end_piece; ++piece) AddPartial(pass, op, piece);
}

void RunFfnTokens(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch& thread) {
  ComputePieces(pass, phase, piece, piece + 1, pass.scratch.inputs.get(), thread);
}

void RunFfnSumTokens(const Pass& pass, const Phase& phase, int32_t piece, ThreadScratch&) {
  const ProgramShape& shape = pass.shape();
  const int64_t padded = PaddedCols(shape.format, shape.hidden_size);
  const TokenRange tokens = TokensOf(pass, piece);
  for (int32_t t = tokens.first; t < tokens.last; ++t)
    AddToResult(pass, pass.program.op<Ffn>(phase), t, pass.scratch.partials + t * padded,
                kFfnPieces);
}

}  // namespace hybrid
