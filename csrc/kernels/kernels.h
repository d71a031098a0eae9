// The kernel contract: plain structs of pointers and sizes, and one table of functions per ISA.
//
// Every function is thread-safe: it reads its inputs and writes only the outputs named in its
// arguments, which no two concurrent calls may share. No kernel allocates, throws or keeps state.
//
// Packed rows. A matrix is a number of rows of `n_cols` weights, each padded to whole groups.
// Matrices of which all rows are read are interleaved, so that reading them is one pass over rising
// addresses: tiles of kRowTile rows, and of a tile group by group, first the rows' scales, then
// their values. Others (the up and down rows of neurons; gate rows that a predictor names) keep
// each row's values in one stretch, its scales in another. Gate rows that a predictor names have
// their groups out of order (NextPlace): read in the order of its sums a row is then no stream,
// which hardware would go on prefetching beyond its end (docs/log.md).
//
// bf16: values in order, groups of 32; padded with zeros to a multiple of 32.
//
// q8: blocks of 32 weights with one fp16 scale (the semantics of GGUF's Q8_0). Values are stored as
// uint8 = int8 + 128, eight blocks (256 weights) interleaved into a group: byte 32 k + 4 b + c of a
// group is element 4 k + c of block b. So an int32 lane of a vector register always belongs to one
// block, and a whole group needs one conversion and one multiplication by its scales. Padded with
// zero weights (uint8 128) of scale 0 to a multiple of 256.
//
// q4: blocks of 32 weights (nibble - 8) * scale (the semantics of GGUF's Q4_0), in groups as in q8.
// Byte j of a group's 128 holds the nibbles of positions j (low) and 128 + j (high), where position
// 32 k + 4 b + c is element 4 k + c of block b. Padded with nibbles 8 of scale 0.
//
// An activation vector that meets such rows is laid out alike ("quantised vector", see
// VectorBytes).
//
// bf16: values rounded to bf16.
//
// q8, q4: int8 values interleaved as above, then a fp32 scale per block, then an int32 per block:
// -128 times the block's sum, which undoes the +128 of the weights where the ISA multiplies uint8
// by int8.
#pragma once

#include <stdint.h>

namespace hybrid {

enum class Format : int32_t { kBf16 = 0, kQ8 = 1, kQ4 = 2 };
enum class Activation : int32_t { kRelu = 0, kFatRelu = 1, kSilu = 2 };

constexpr int32_t kBlock = 32;       // weights that share a scale
constexpr int32_t kGroupBlocks = 8;  // blocks that are interleaved
constexpr int32_t kGroup = kBlock * kGroupBlocks;
constexpr int32_t kRowTile = 4;     // rows that are interleaved
constexpr int32_t kHeadAlign = 16;  // heads are padded to a multiple of this, with zeros
constexpr int32_t kSpan = 256;      // context positions per piece of attention
constexpr int32_t kKeyTile = 64;    // keys that are interleaved: element d of all, then d + 1
constexpr int32_t kHeadTile = 4;    // query heads that attention takes at once
constexpr int32_t kMaxPieces = 16;  // of an FFN's neurons
constexpr int32_t kTokenTile = 64;  // tokens that an FFN piece takes at most

enum class RowLayout : int32_t {
  kInterleaved,  // in tiles
  kRowMajor,
  kBitReversed,  // apart, groups out of order
};

struct Rows {
  const uint8_t* values;  // of the first row; 2-byte aligned at least
  const uint8_t* scales;  // q8, q4: fp16
  int64_t values_stride;  // bytes from one tile, or one row where they are apart, to the next
  int64_t scales_stride;
  int32_t n_rows;
  int32_t n_cols;  // before padding
  RowLayout layout;
};

static inline int32_t RoundUp(int32_t n, int32_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
static inline int32_t PaddedCols(Format format, int32_t n_cols) {
  return RoundUp(n_cols, format == Format::kBf16 ? kBlock : kGroup);
}
// Bytes of the values of one packed row.
static inline int64_t ValueBytes(Format format, int32_t n_cols) {
  const int64_t padded = PaddedCols(format, n_cols);
  return format == Format::kBf16 ? padded * 2 : format == Format::kQ8 ? padded : padded / 2;
}
// Bytes of the scales of one packed row.
static inline int64_t ScaleBytes(Format format, int32_t n_cols) {
  return format == Format::kBf16 ? 0 : PaddedCols(format, n_cols) / kBlock * 2;
}
// Bytes of a group of one row.
static constexpr int32_t GroupValueBytes(Format format) {
  return format == Format::kBf16 ? 2 * kBlock : format == Format::kQ8 ? kGroup : kGroup / 2;
}
static constexpr int32_t GroupScaleBytes(Format format) {
  return format == Format::kBf16 ? 0 : 2 * kGroupBlocks;
}
static constexpr int64_t TileGroupBytes(Format format) {
  return int64_t{kRowTile} * (GroupValueBytes(format) + GroupScaleBytes(format));
}
// Bytes that reading one packed row takes.
static inline int64_t RowBytes(const Rows& rows, Format format) {
  return ValueBytes(format, rows.n_cols) + ScaleBytes(format, rows.n_cols);
}
// Where a row begins in memory, or the tile that it is in, which begins with its rows' scales.
static inline const uint8_t* StartOf(const Rows& rows, int32_t row) {
  return rows.layout == RowLayout::kInterleaved ? rows.scales + row / kRowTile * rows.values_stride
                                                : rows.values + row * rows.values_stride;
}
static inline int32_t CountGroups(Format format, int32_t n_cols) {
  return static_cast<int32_t>(ValueBytes(format, n_cols) / GroupValueBytes(format));
}
// Where the group after that at `place` lies in a gathered row: bits count up from the highest.
// After the last comes place 0 again, that of the first.
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
// Bytes of a quantised vector of n_cols elements, a multiple of 64.
static inline int64_t VectorBytes(Format format, int32_t n_cols) {
  const int64_t padded = PaddedCols(format, n_cols);
  return format == Format::kBf16 ? padded * 2 : padded + padded / kBlock * 8;
}

// out[token * out_stride + row - first] = dot(row, token) for rows [first, last) and all tokens.
struct GemmArgs {
  Format format;
  Rows rows;
  int32_t first, last;
  const uint8_t* x;  // quantised vectors, x_stride bytes apart
  int64_t x_stride;
  int32_t n_tokens;
  float* out;
  int64_t out_stride;  // floats
};

// A predictor names the neurons that may fire, for less than their gate rows cost; the gate of
// those it names is computed as ever, so that the only error is a neuron that it misses.
//
// Tiles of kPredictTile neurons: lines of kPredictLine bytes, four of each neuron, then what a
// neuron's score is compared with. Neurons beyond the last are never predicted.
//
// kLowRank: two small matrices, a (rank, hidden) and b (n_neurons, rank). z = a x is rounded to
// int8 with one scale. Of b's columns the first kWideRank are int8, since a gate's largest
// directions (what all tokens share, above all) need more than 16 levels, the others 4 bits, each
// kind with a scale of its own. The first line holds the wide ones + 128; each further line eight
// columns, nibbles + 8: byte c of a neuron's four holds columns c (low) and 4 + c (high). Then 16
// fp32 scales of the wide, 16 of the narrow ones, 16 biases: predicted where
// wide_scale * (b z over the wide) + narrow_scale * (b z over the others) + bias >= 0.
//
// kSign: line k holds 32 sign bits of each gate row, in the order of a quantised vector; then 16
// int32 limits: predicted where no more of them than that differ from x's.
enum class PredictorKind : int32_t { kLowRank = 0, kSign = 1 };
constexpr int32_t kPredictTile = 16;
constexpr int32_t kPredictLine = 4 * kPredictTile;
constexpr int32_t kWideRank = 4;
struct Predictor {
  PredictorKind kind;
  int32_t size;  // kLowRank: rank, a multiple of 4; kSign: words of 32 bits
  const uint8_t* tiles;
};
static inline int32_t PredictLines(const Predictor& p) {
  return p.kind == PredictorKind::kLowRank ? 1 + (p.size - kWideRank + 7) / 8 : p.size;
}
static inline int64_t PredictTileBytes(const Predictor& p) {
  return int64_t{kPredictLine} * (PredictLines(p) + (p.kind == PredictorKind::kLowRank ? 3 : 1));
}
// Elements of z with those that make the last line whole.
static inline int32_t PaddedRank(const Predictor& p) {
  return kWideRank + 8 * (PredictLines(p) - 1);
}
// Bytes of what a predictor is asked with: z as int8 (PaddedRank), its fp32 scale, then as int32
// -128 times the sum of its wide elements, -8 times that of the others; or sign bits. A multiple
// of 4.
static inline int64_t PredictorInputBytes(const Predictor& p) {
  return p.kind == PredictorKind::kLowRank ? PaddedRank(p) + 12 : 4 * int64_t{p.size};
}

// A preview of the head: all rows in 2 bits. Logits from it say which rows are worth reading in
// full (SVD-softmax, Shim et al., NIPS 2017; theirs has fewer columns, ours fewer bits).
//
// Tiles of kPredictTile rows: lines of kPredictLine bytes, four of each row: byte c holds columns
// c, 4 + c, 8 + c and 12 + c of the line's 16, from the lowest bits on; a weight is (bits - 1.5)
// times its row's scale. Then the 16 rows' fp32 scales.
constexpr int32_t kPreviewCols = 16;  // of a line
struct Preview {
  const uint8_t* tiles;
  int32_t n_rows;
  int32_t n_cols;  // a multiple of kPreviewCols
};
static inline int32_t CountTiles(const Preview& p) {
  return (p.n_rows + kPredictTile - 1) / kPredictTile;
}
static inline int64_t PreviewTileBytes(const Preview& p) {
  return int64_t{kPredictLine} * (p.n_cols / kPreviewCols + 1);
}
// What 2 bits leave out of a weight: its variance, in scales squared (normally distributed
// weights). A logit that is `e` too small, e random of variance v, stands for a probability exp(v /
// 2) larger on average: so much is added to it, and the probabilities of all rows sum up to what
// they should.
constexpr float kPreviewVariance = 0.107f;
// Bytes of what it is asked with: int8 values; then in fp32 their scale, -1.5 times their sum, and
// half of kPreviewVariance times the sum of their squares.
static inline int64_t PreviewInputBytes(int32_t n_cols) { return n_cols + 12; }

// One active (neuron, token) pair and what its gate came to.
struct Active {
  int32_t neuron, token;
  float gate;
};

// Neighbouring fixed pieces of the neurons of a gated FFN, together [first, last), for up to
// kTokenTile tokens, in two steps: `find_active` lists the pairs that fire, `add_active` overwrites
// `out`, every piece's own partial sum, with the sum over its pairs of act(gate x) * (up x) * down.
// Columns of `out` are in the order of partial sums (see PartialColumn).
struct SparseFfnArgs {
  Format format;
  // Neuron-major: row j of each belongs to neuron j. Its up and down rows make a bundle: the values
  // of up, of down, then their scales, one after the other from up's values on.
  Rows gate, up, down;
  int32_t first, last;
  Activation activation;
  float threshold;   // of kFatRelu: fires when gate >= threshold; kRelu fires when gate > 0
  const uint8_t* x;  // quantised vectors, x_stride bytes apart
  int64_t x_stride;
  int32_t n_tokens;
  float* out;  // PaddedCols(format, hidden) floats per token, out_stride apart
  int64_t out_stride;
  bool computes_all;  // list inactive neurons too, as a dense engine does: they add zeros
  Active* active;     // the list: room for (last - first) * n_tokens pairs, and one more
  // Null: every gate is computed. Not with computes_all; its gate rows stand apart, scales behind
  // values.
  const Predictor* predictor = nullptr;
  const uint8_t* predictor_inputs = nullptr;  // one a token
  int64_t predictor_input_stride = 0;
  int32_t* predicted = nullptr;  // scratch: room for last - first neurons, and one more
  // What another device computed: gates of neurons [0, n_given), a row a token, 0 where a neuron
  // does not fire. Those are listed as they stand; the others' gates are computed here.
  const float* given_gates = nullptr;
  int64_t given_stride = 0;  // floats from a token's row to the next
  int32_t n_given = 0;
  int32_t n_pieces = 1;
  const int32_t* piece_ends = nullptr;  // of all pieces but the last: one behind their neurons
  int64_t piece_stride = 0;             // floats from one piece's partial sums to the next one's
};

// Numbers of (neuron, token) pairs.
struct ActiveCounts {
  int32_t n_listed;      // in the list
  int64_t n_active;      // that fire
  int64_t n_predicted;   // whose gate was computed
  int32_t n_prefetched;  // bundles of the list that come into L2 already
};

// Partial sums over q8 and q4 rows stand as the rows' fields come out of registers. A row's values
// are lines of 64 bytes, a line 16 little-endian words of 32 bits, a word 4 bytes (q8) or 8 nibbles
// (q4). The sum that belongs to field f of word i of line l is number (l * fields + f) * 16 + i,
// and is kept multiplied by 2^shift: field f begins `shift` bits above the word's lower or upper
// half.
constexpr int32_t kPartialLine = 64;  // bytes
constexpr int32_t kPartialWords = kPartialLine / 4;
static constexpr int32_t WordFields(Format format) { return format == Format::kQ8 ? 4 : 8; }
struct PartialColumn {
  int32_t index;  // within the group's partial sums
  float unit;     // 2^-shift
};
// Of a natural column of a group: element 4 k + c of block b.
static constexpr PartialColumn PartialColumnOf(Format format, int32_t col) {
  if (format == Format::kBf16) return {col, 1.0f};
  const int32_t fields = WordFields(format), bits = 32 / fields;
  const int32_t b = col / kBlock, k = col % kBlock / 4, c = col % 4;
  const int32_t row = format == Format::kQ8 ? k : k % 4;  // of 32 bytes: two make a line
  const int32_t field = format == Format::kQ8 ? c : 2 * c + k / 4;
  return {(row / 2 * fields + field) * kPartialWords + row % 2 * kGroupBlocks + b,
          1.0f / static_cast<float>(1 << field % (fields / 2) * bits)};
}

// Attention of the query heads of one KV head over up to kSpan context positions.
struct AttendSpanArgs {
  const float* q;     // (n_group, head_stride), already divided by sqrt(head_dim)
  const uint16_t* k;  // fp16 (tiles, head_stride, kKeyTile): tiles of keys; the last may be partial
  const uint16_t* v;  // fp16 (n, head_stride)
  int32_t n_group;
  int32_t head_stride;  // head_dim padded to kHeadAlign with zeros
  int32_t n;            // positions
  // What this thread will probably read next: as many bytes as the values have are prefetched while
  // values are summed, as the values are while keys are scored. Null where all is in the cache.
  const void* next;
  float* scores;  // scratch: kHeadTile * kSpan floats
  float* max;     // (n_group,) largest score
  float* sum;     // (n_group,) sum of exp(score - max)
  float* out;     // (n_group, head_stride) sum of exp(score - max) * v
};

struct KernelTable {
  const char* name;
  // (n,) fp32 weights -> one packed row: ValueBytes and ScaleBytes, padding included.
  void (*pack_row)(Format format, const float* w, int32_t n, uint8_t* values, uint8_t* scales);
  // x (n,) fp32 -> quantised vector.
  void (*quantize)(Format format, const float* x, int32_t n, uint8_t* out);
  // One packed row -> (n_cols,) fp32 in natural order, times `scale`.
  void (*dequantize)(Format format, const Rows& rows, int32_t row, float scale, float* out);
  void (*gemm)(const GemmArgs& args);
  ActiveCounts (*find_active)(const SparseFfnArgs& args);
  void (*add_active)(const SparseFfnArgs& args, const ActiveCounts& found);
  // out[c] = sum over pieces of partials[piece * stride + c], n columns, a multiple of kBlock, all
  // in the order of partial sums; out may be the first piece. See add_partials.
  void (*sum_partials)(const float* partials, int64_t stride, int32_t n_pieces, int32_t n,
                       float* out);
  // x[c] += scale * sum over pieces of partials[piece * stride + c], n columns. Of a power of two
  // of pieces, kMaxPieces at most, the second half is added to the first, until one is left.
  // Partials are in their own order, x in natural order.
  void (*add_partials)(Format format, const float* partials, int64_t stride, int32_t n_pieces,
                       int32_t n, float scale, float* x);
  void (*rms_norm)(const float* x, const float* weight, int32_t n, float eps, float scale,
                   float* out);
  // Rotary embedding of one head, times `scale`: dimension i belongs to i + half. `out` is another
  // array than x; cos and sin are those of the position, (half,).
  void (*rotate)(const float* x, const float* cos, const float* sin, int32_t half, float scale,
                 float* out);
  void (*attend_span)(const AttendSpanArgs& args);
  // Softmax of one head over spans, in index order: the maximum, the sum and the values of span s
  // stand s * stride heads behind those of the first. `merged`: (head_dim,).
  void (*merge_spans)(const float* max, const float* sum, const float* values, int32_t n_spans,
                      int64_t stride, int32_t head_dim, int32_t head_stride, float* merged);
  // (n,) fp32 -> fp16, round to nearest even.
  void (*to_fp16)(const float* x, int32_t n, uint16_t* out);
  // What a predictor is asked with: of z, `size` floats, or of x, a quantised vector.
  void (*make_predictor_input)(const Predictor& predictor, Format format, const uint8_t* x,
                               int32_t n_cols, const float* z, uint8_t* out);
  // x (n,) fp32 -> what a preview is asked with.
  void (*make_preview_input)(const float* x, int32_t n, uint8_t* out);
  // Logits of the rows of tiles [first, last), and of each of these tiles the largest, +inf where
  // one is NaN; both begin with those of tile `first`.
  void (*preview)(const Preview& preview, int32_t first, int32_t last, const uint8_t* input,
                  float* logits, float* tile_maxima);
  // out[rows[i]] = dot(row rows[i], x), bit for bit as gemm: n rows, which stand apart.
  void (*gather_dots)(Format format, const Rows& matrix, const int32_t* rows, int32_t n,
                      const uint8_t* x, float* out);
  // The sum of (n,) floats, n a multiple of 128: reads memory as fast as this ISA can.
  float (*read)(const float* x, int64_t n);
};

}  // namespace hybrid
