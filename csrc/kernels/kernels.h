// The kernel contract: plain structs of pointers and sizes, and one table of functions per ISA.
//
// Every function is thread-safe. It reads its inputs and writes only the outputs that its arguments
// name; no two concurrent calls may share an output. No kernel allocates, throws or keeps state.
//
// Row layouts. A packed matrix is a number of rows of `n_cols` weights. Each row is padded to whole
// groups, with zeros that change no sum, so `n_cols` may be any number. Vectors are padded alike.
// RowLayout says how the rows lie in memory:
// - kInterleaved, for matrices of which every row is read. Rows form tiles of kRowTile rows. A tile
//   is stored group by group: first the scales of its rows, then their values. Reading the matrix
//   is then one pass over rising addresses.
// - kRowMajor, for matrices of which only some rows are read, such as the up and down rows of
//   neurons. The values of a row are contiguous, and so are its scales.
// - kBitReversed, for gate rows that a predictor selects. As row-major, but the groups of a row are
//   stored in bit-reversed order (NextPlace). A kernel reads them in the order of its sums. Its
//   addresses then form no stream, which the hardware would go on prefetching beyond the row's end
//   (docs/log.md).
//
// bf16 and f16 rows: values of two bytes in order, in groups of 32. A row is padded with zeros to a
// multiple of 32.
//
// q8 rows: blocks of 32 weights with one fp16 scale each (the semantics of GGUF's Q8_0). Values are
// stored as uint8 = int8 + 128. Eight blocks (256 weights) are interleaved into a group: byte
// 32 k + 4 b + c of a group is element 4 k + c of block b. An int32 lane of a vector register
// therefore always belongs to one block. A whole group needs one conversion and one multiplication
// by its scales. A row is padded to a multiple of 256 with zero weights (uint8 128) of scale 0.
//
// q4 rows: blocks of 32 weights (nibble - 8) * scale (the semantics of GGUF's Q4_0), in groups as
// in q8. Byte j of a group's 128 holds the nibbles of positions j (low) and 128 + j (high).
// Position 32 k + 4 b + c is element 4 k + c of block b. A row is padded with nibbles 8 of scale 0.
//
// Quantised vectors. Before an activation vector is multiplied with packed rows, it is quantised
// and laid out like them. VectorBytes gives its size.
//
// bf16 vectors: values rounded to bf16.
//
// f16 vectors: fp32 values. The only rounding is then that of the weights, and a product of an fp16
// weight needs no other conversion.
//
// q8 and q4 vectors: int8 values interleaved as above, then one fp32 scale per block, then one
// int32 correction per block. The correction is -128 times the block's sum. It undoes the +128 of
// the weights on ISAs that multiply uint8 by int8.
#pragma once

#include <stdint.h>

namespace hybrid {

enum class Format : int32_t { kBf16 = 0, kQ8 = 1, kQ4 = 2, kF16 = 3 };
enum class Activation : int32_t { kRelu = 0, kFatRelu = 1, kSilu = 2 };
enum class KvFormat : int32_t { kFp16 = 0, kBf16 = 1 };  // of keys and values in the cache

constexpr int32_t kBlock = 32;       // weights, or activations, that share a scale
constexpr int32_t kGroupBlocks = 8;  // blocks that are interleaved in a group
constexpr int32_t kGroup = kBlock * kGroupBlocks;
constexpr int32_t kRowTile = 4;     // rows that are interleaved in a tile
constexpr int32_t kHeadAlign = 16;  // head_dim is padded with zeros to a multiple of this
constexpr int32_t kSpan = 256;      // context positions per piece of attention
constexpr int32_t kKeyTile = 64;    // interleaved keys: element d of all keys, then element d + 1
constexpr int32_t kHeadTile = 4;    // query heads that attention computes at once
constexpr int32_t kMaxPieces = 16;  // most pieces that the neurons of an FFN are cut into
constexpr int32_t kTokenTile = 64;  // most tokens that one FFN call computes
// Up to so many tokens, what counts is that memory is read once and without a break. With more
// tokens arithmetic counts.
constexpr int32_t kFewTokens = 16;

enum class RowLayout : int32_t {
  kInterleaved,  // tiles of kRowTile rows
  kRowMajor,
  kBitReversed,  // row-major, the groups of a row in bit-reversed order
};

struct Rows {
  const uint8_t* values;  // of the first row; at least 2-byte aligned
  const uint8_t* scales;  // of the first row; fp16, only for q8 and q4
  int64_t values_stride;  // bytes from one tile (interleaved) or row (otherwise) to the next
  int64_t scales_stride;
  int32_t n_rows;
  int32_t n_cols;  // before padding
  RowLayout layout;
  // Every weight is multiplied with this power of two. It is 1 unless the weights are so small or
  // so large that the format alone cannot hold them.
  float matrix_scale = 1.0f;
};

static inline int32_t RoundUp(int32_t n, int32_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
// Whether a format has integers with scales of blocks. The others have values of two bytes.
static constexpr bool HasBlocks(Format format) {
  return format == Format::kQ8 || format == Format::kQ4;
}
static inline int32_t PaddedCols(Format format, int32_t n_cols) {
  return RoundUp(n_cols, HasBlocks(format) ? kGroup : kBlock);
}
// Bytes of the values of one packed row.
static inline int64_t ValueBytes(Format format, int32_t n_cols) {
  const int64_t padded = PaddedCols(format, n_cols);
  return !HasBlocks(format) ? padded * 2 : format == Format::kQ8 ? padded : padded / 2;
}
// Bytes of the scales of one packed row.
static inline int64_t ScaleBytes(Format format, int32_t n_cols) {
  return HasBlocks(format) ? PaddedCols(format, n_cols) / kBlock * 2 : 0;
}
// Bytes of one group of one row.
static constexpr int32_t GroupValueBytes(Format format) {
  return !HasBlocks(format) ? 2 * kBlock : format == Format::kQ8 ? kGroup : kGroup / 2;
}
static constexpr int32_t GroupScaleBytes(Format format) {
  return HasBlocks(format) ? 2 * kGroupBlocks : 0;
}
static constexpr int64_t TileGroupBytes(Format format) {
  return int64_t{kRowTile} * (GroupValueBytes(format) + GroupScaleBytes(format));
}
// Bytes read for one packed row: values and scales.
static inline int64_t RowBytes(const Rows& rows, Format format) {
  return ValueBytes(format, rows.n_cols) + ScaleBytes(format, rows.n_cols);
}
// The first byte of a row. For interleaved rows it is the first byte of the row's tile, which
// begins with the scales.
static inline const uint8_t* StartOf(const Rows& rows, int32_t row) {
  return rows.layout == RowLayout::kInterleaved ? rows.scales + row / kRowTile * rows.values_stride
                                                : rows.values + row * rows.values_stride;
}
static inline int32_t CountGroups(Format format, int32_t n_cols) {
  return static_cast<int32_t>(ValueBytes(format, n_cols) / GroupValueBytes(format));
}
// In a bit-reversed row, the place of the group that follows the group at `place` in natural order:
// bits count up from the highest. After the last group comes place 0, the place of the first.
static inline int32_t NextPlace(int32_t place, int32_t n_groups) {
  int32_t highest = 1;
  while (2 * highest < n_groups) highest *= 2;
  do {
    int32_t bit = highest;
    for (; (place & bit) != 0; bit /= 2) place ^= bit;
    place |= bit;
  } while (place >= n_groups);
  return place;
}
// Bytes of a quantised vector of n_cols elements. A multiple of 64.
static inline int64_t VectorBytes(Format format, int32_t n_cols) {
  const int64_t padded = PaddedCols(format, n_cols);
  if (HasBlocks(format)) return padded + padded / kBlock * 8;
  return padded * (format == Format::kBf16 ? 2 : 4);
}

// out[token * out_stride + row - first] = dot(row, token) for rows [first, last) and all tokens.
struct GemmArgs {
  Format format;
  Rows rows;
  int32_t first, last;
  const uint8_t* x;  // quantised vectors at a stride of x_stride bytes
  int64_t x_stride;
  int32_t n_tokens;
  float* out;
  int64_t out_stride;  // floats
};

// A predictor selects the neurons that may fire, at a lower cost than reading all gate rows. The
// gate of every selected neuron is still computed as without a predictor. The only possible error
// is therefore a neuron that the predictor misses.
//
// A predictor is two small matrices, a (rank, hidden) and b (n_neurons, rank). z = a x is rounded
// to int8 with one scale. The first kWideRank columns of b are int8, the others have 4 bits; each
// of the two kinds has its own scale. The first columns are wide because a gate's largest
// directions (above all, what all tokens share) need more than 16 levels. A neuron is predicted if
// wide_scale * (b z over the wide) + narrow_scale * (b z over the others) + bias >= 0.
//
// b is stored as tiles of kPredictTile neurons. A tile is a number of lines of kPredictLine bytes,
// with four bytes of each neuron per line. The first line holds the wide columns + 128. Each
// further line holds eight columns as nibbles + 8: byte c of a neuron's four holds columns c (low)
// and 4 + c (high). Then follow 16 fp32 scales of the wide columns, 16 of the narrow columns and 16
// biases. Neurons beyond the last are never predicted.
constexpr int32_t kPredictTile = 16;
constexpr int32_t kPredictLine = 4 * kPredictTile;
//
// Files of other engines bring predictors with a nonlinearity between the matrices: z = relu(a x +
// bias), and a neuron is predicted if b z + bias >= threshold. Their b is kept as interleaved q8
// rows, `second`, of which kPredictTile rows are a tile. Their input is z as a q8 vector.
constexpr int32_t kWideRank = 4;
struct Predictor {
  int32_t rank;  // a multiple of 4, unless `second` is in use
  const uint8_t* tiles;
  Rows second = {};               // no rows: `tiles` are lines as above
  const float* biases = nullptr;  // (n_neurons,) of `second`; null: zeros
  float threshold = 0.0f;         // of `second`
};
static inline bool IsMlp(const Predictor& p) { return p.second.n_rows > 0; }
static inline int32_t PredictLines(const Predictor& p) { return 1 + (p.rank - kWideRank + 7) / 8; }
static inline int64_t PredictTileBytes(const Predictor& p) {
  if (IsMlp(p)) return kPredictTile / kRowTile * p.second.values_stride;
  return int64_t{kPredictLine} * (PredictLines(p) + 3);
}
// The rank, padded so that the last line is full.
static inline int32_t PaddedRank(const Predictor& p) {
  return kWideRank + 8 * (PredictLines(p) - 1);
}
// Bytes of a predictor's input for one token, a multiple of 4: z as int8 (PaddedRank), then its
// fp32 scale, then two int32 corrections: -128 times the sum of the wide elements of z, and -8
// times the sum of the others.
static inline int64_t PredictorInputBytes(const Predictor& p) {
  return IsMlp(p) ? VectorBytes(Format::kQ8, p.rank) : PaddedRank(p) + 12;
}

// A preview is a copy of the output head in 2 bits, from which the logits of all rows are
// estimated. The estimates say which rows are worth reading in full: the shortlist. The method is
// SVD-softmax (Shim et al., NIPS 2017); theirs has fewer columns, ours fewer bits.
//
// A preview is stored as tiles of kPredictTile rows. A tile is a number of lines of kPredictLine
// bytes, with four bytes of each row per line, then the 16 rows' fp32 scales. Byte c of a row's
// four holds columns c, 4 + c, 8 + c and 12 + c of the line's 16, from the lowest bits on. A weight
// is (bits - 1.5) times its row's scale. Columns that fill up the last line meet zeros of x.
constexpr int32_t kPreviewCols = 16;  // columns of one line
struct Preview {
  const uint8_t* tiles;
  int32_t n_rows;
  int32_t n_cols;
};
static inline int32_t CountTiles(const Preview& p) {
  return (p.n_rows + kPredictTile - 1) / kPredictTile;
}
static inline int64_t PreviewTileBytes(const Preview& p) {
  return int64_t{kPredictLine} * (RoundUp(p.n_cols, kPreviewCols) / kPreviewCols + 1);
}
// The variance of what 2 bits leave out of a weight, in scales squared (for normally distributed
// weights). Noise of variance v in a logit makes its probability exp(v / 2) times as large on
// average. So v / 2 is subtracted from each logit: the probabilities of all rows then sum up to
// what they should.
constexpr float kPreviewVariance = 0.107f;
// Bytes of a preview's input: int8 values of whole lines, then three fp32 numbers. These are the
// scale of the values, -1.5 times their sum, and -kPreviewVariance / 2 times the sum of their
// squares.
static inline int64_t PreviewInputBytes(int32_t n_cols) {
  return RoundUp(n_cols, kPreviewCols) + 12;
}

// One active (neuron, token) pair and the value of its gate.
struct Active {
  int32_t neuron, token;
  float gate;
};

// Neighbouring pieces of the neurons of a gated FFN, together neurons [first, last), for up to
// kTokenTile tokens. Pieces are fixed: they do not depend on the number of threads.
//
// The computation has two steps. `find_active` lists the pairs that fire. `add_active` overwrites
// `out`, which holds one partial sum per piece and token: the sum of act(gate x) * (up x) * down
// over the pairs of that piece and token. The columns of `out` are in the order of partial sums
// (see PartialColumn).
struct SparseFfnArgs {
  Format format;
  // Row j of each belongs to neuron j. The up row and the down row of a neuron form a bundle, which
  // is contiguous: the values of up, the values of down, the scales of up, the scales of down.
  Rows gate, up, down;
  int32_t first, last;
  Activation activation;
  float threshold;   // kFatRelu fires if gate >= threshold; kRelu fires if gate > 0
  const uint8_t* x;  // quantised vectors at a stride of x_stride bytes
  int64_t x_stride;
  int32_t n_tokens;
  float* out;  // PaddedCols(format, hidden) floats per token, at a stride of out_stride floats
  int64_t out_stride;
  bool computes_all;  // also list inactive neurons, which add zeros: the work of a dense engine
  Active* active;     // the list: room for (last - first) * n_tokens + 1 pairs
  // Null: every gate is computed. A predictor excludes computes_all. Its gate rows are
  // kBitReversed, and the scales of a row follow its values.
  const Predictor* predictor = nullptr;
  const uint8_t* predictor_inputs = nullptr;  // one per token
  int64_t predictor_input_stride = 0;
  int32_t* predicted = nullptr;  // scratch: room for last - first + 1 neurons
  // Gates of neurons [0, n_given), which another device computed: one row per token, 0 if a neuron
  // does not fire. These neurons are listed with the given gates; the gates of the others are
  // computed here.
  const float* given_gates = nullptr;
  int64_t given_stride = 0;  // floats from one token's row to the next
  int32_t n_given = 0;
  int32_t n_pieces = 1;
  const int32_t* piece_ends = nullptr;  // of all pieces but the last: the end of their neurons
  int64_t piece_stride = 0;             // floats from one piece's partial sums to the next
};

struct ActiveCounts {
  // (neuron, token) pairs:
  int32_t n_listed;     // pairs in the list
  int64_t n_active;     // pairs that fire
  int64_t n_predicted;  // pairs whose gate was computed
  // Neurons:
  int32_t n_gate_rows;   // whose gate row was read
  int32_t n_bundles;     // that are listed for any token
  int32_t n_prefetched;  // at the list's start whose bundles are already prefetched into L2
};

// The order of partial sums. Over q8 and q4 rows, sums are kept in the order in which the rows'
// fields come out of registers; add_partials brings them into natural order. The values of a row
// are lines of 64 bytes. A line is 16 little-endian words of 32 bits. A word has 4 fields of a byte
// (q8) or 8 of a nibble (q4). The sum that belongs to field f of word i of line l is number
// (l * fields + f) * 16 + i. It is kept multiplied by 2^shift, since field f begins `shift` bits
// above the lowest bit of the word's lower or upper half.
constexpr int32_t kPartialLine = 64;  // bytes
constexpr int32_t kPartialWords = kPartialLine / 4;
static constexpr int32_t WordFields(Format format) { return format == Format::kQ8 ? 4 : 8; }
struct PartialColumn {
  int32_t index;  // within the group's partial sums
  float unit;     // 2^-shift
};
// The partial sum that belongs to natural column `col` of a group, which is element 4 k + c of
// block b.
static constexpr PartialColumn PartialColumnOf(Format format, int32_t col) {
  if (!HasBlocks(format)) return {col, 1.0f};
  const int32_t fields = WordFields(format), bits = 32 / fields;
  const int32_t b = col / kBlock, k = col % kBlock / 4, c = col % 4;
  const int32_t row = format == Format::kQ8 ? k : k % 4;  // of 32 bytes; two rows make a line
  const int32_t field = format == Format::kQ8 ? c : 2 * c + k / 4;
  return {(row / 2 * fields + field) * kPartialWords + row % 2 * kGroupBlocks + b,
          1.0f / static_cast<float>(1 << field % (fields / 2) * bits)};
}

// Attention of the query heads of one KV head over up to kSpan context positions.
struct AttendSpanArgs {
  KvFormat kv;        // of k and v
  const float* q;     // (n_group, head_stride), already divided by sqrt(head_dim)
  const uint16_t* k;  // (tiles, head_stride, kKeyTile); the last tile may be partial
  const uint16_t* v;  // (n, head_stride)
  int32_t n_group;
  int32_t head_stride;  // head_dim padded to kHeadAlign with zeros
  int32_t n;            // positions
  // What this thread will probably read after the span. While keys are scored, the values are
  // prefetched. While values are summed, as many bytes as the values have are prefetched from here.
  // Null if all is in the cache: then nothing is prefetched.
  const void* next;
  float* scores;  // scratch: kHeadTile * kSpan floats
  float* max;     // (n_group,) the largest score
  float* sum;     // (n_group,) the sum of exp(score - max)
  float* out;     // (n_group, head_stride) the sum of exp(score - max) * v
};

struct KernelTable {
  const char* name;
  // (n,) fp32 weights -> one packed row: ValueBytes and ScaleBytes, padding included.
  void (*pack_row)(Format format, const float* w, int32_t n, uint8_t* values, uint8_t* scales);
  // x (n,) fp32 -> quantised vector.
  void (*quantize)(Format format, const float* x, int32_t n, uint8_t* out);
  // One packed row -> (n_cols,) fp32 weights in natural order, times `scale`.
  void (*dequantize)(Format format, const Rows& rows, int32_t row, float scale, float* out);
  void (*gemm)(const GemmArgs& args);
  ActiveCounts (*find_active)(const SparseFfnArgs& args);
  void (*add_active)(const SparseFfnArgs& args, const ActiveCounts& found);
  // out[c] = sum over pieces of partials[piece * stride + c], for n columns, a multiple of kBlock.
  // All are in the order of partial sums. `out` may be the first piece. The order of additions is
  // that of add_partials.
  void (*sum_partials)(const float* partials, int64_t stride, int32_t n_pieces, int32_t n,
                       float* out);
  // x[c] += scale * sum over pieces of partials[piece * stride + c], for n columns. The number of
  // pieces is a power of two, at most kMaxPieces. The second half of the pieces is added to the
  // first half, until one piece is left. Partials are in the order of partial sums, x is in natural
  // order.
  void (*add_partials)(Format format, const float* partials, int64_t stride, int32_t n_pieces,
                       int32_t n, float scale, float* x);
  void (*rms_norm)(const float* x, const float* weight, int32_t n, float eps, float scale,
                   float* out);
  // Rotary embedding of one head, times `scale`: dimension i is paired with dimension i + half.
  // `out` must not be x. cos and sin are those of the position, (half,).
  void (*rotate)(const float* x, const float* cos, const float* sin, int32_t half, float scale,
                 float* out);
  void (*attend_span)(const AttendSpanArgs& args);
  // Merges the softmax of one head over spans, in index order. The maximum, the sum and the values
  // of span s are s * stride heads behind those of the first span. `merged`: (head_dim,).
  void (*merge_spans)(const float* max, const float* sum, const float* values, int32_t n_spans,
                      int64_t stride, int32_t head_dim, int32_t head_stride, float* merged);
  // (n,) fp32 -> fp16, rounded to nearest even.
  void (*to_fp16)(const float* x, int32_t n, uint16_t* out);
  // (n,) fp32 -> elements of the KV cache, rounded to nearest even. Returns the largest magnitude
  // of x, or NaN if x holds one.
  float (*to_kv)(KvFormat kv, const float* x, int32_t n, uint16_t* out);
  // z (rank,) fp32 -> a predictor's input (PredictorInputBytes).
  void (*make_predictor_input)(const Predictor& predictor, const float* z, uint8_t* out);
  // x (n,) fp32 -> a preview's input (PreviewInputBytes).
  void (*make_preview_input)(const float* x, int32_t n, uint8_t* out);
  // Estimates the logits of the rows of tiles [first, last). tile_maxima receives the largest logit
  // of each of these tiles, or +inf if one is NaN. Both outputs begin with tile `first`.
  void (*preview)(const Preview& preview, int32_t first, int32_t last, const uint8_t* input,
                  float* logits, float* tile_maxima);
  // out[rows[i]] = dot(row rows[i], x), with the bits that gemm gives, for n rows of a row-major
  // matrix.
  void (*gather_dots)(Format format, const Rows& matrix, const int32_t* rows, int32_t n,
                      const uint8_t* x, float* out);
  // weights[i] = exp((logits[i] - top) / temperature) for n logits, the largest of which is `top`;
  // 0 if that is less than exp(-87).
  void (*weigh_logits)(const float* logits, int32_t n, float top, float temperature,
                       float* weights);
  // Writes the indices of the weights that are at least `bound`, which is above 0, to `ids` (n,),
  // ascending. Returns how many they are.
  int32_t (*find_likely)(const float* weights, int32_t n, float bound, int32_t* ids);
  // The sum of (n,) floats, n a multiple of 128. It reads memory as fast as this ISA can.
  float (*read)(const float* x, int64_t n);
};

}  // namespace hybrid
