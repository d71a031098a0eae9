#include "sampling.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <functional>

namespace hybrid {

namespace {

// Most often the tokens that have at least this share of the largest weight reach top_p.
constexpr float kLikely = 1e-3f;
// Of smaller weights the rounding to fp32 matters less than 1e-9 of the sum.
constexpr float kSmall = 1e-4f;
constexpr int32_t kSummed = 256;  // weights that are added up before any is looked at

// Keys order positive floats by their exponent and seven bits behind it.
constexpr uint32_t kKeyShift = 16, kNumKeys = (0x3f800000u >> kKeyShift) + 1;  // up to 1.0f
inline uint32_t KeyOf(float weight) {
  uint32_t bits;
  memcpy(&bits, &weight, sizeof(bits));
  return std::min(bits >> kKeyShift, kNumKeys - 1);
}

// The sum of up to kSummed weights, in the same order on every ISA.
double SumBlock(const float* weights, int32_t n) {
  constexpr int32_t kSums = 8;
  double sums[kSums] = {}, total = 0.0;
  int32_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int32_t j = 0; j < kSums; ++j) sums[j] += weights[i + j];
  for (; i < n; ++i) total += weights[i];
  for (const double sum : sums) total += sum;
  return total;
}

double SumAll(const float* weights, int32_t n) {
  double total = 0.0;
  for (int32_t i = 0; i < n; i += kSummed) total += SumBlock(weights + i, std::min(kSummed, n - i));
  return total;
}

// The first index at which the running sum exceeds `point`; before `first` the sum is `sum`. If
// rounding leaves none, the last index with a weight.
template <typename WeightAt>
int32_t FindPoint(int32_t first, int32_t n, double sum, double point, const WeightAt& weight_at) {
  for (int32_t i = first; i < n; ++i) {
    sum += weight_at(i);
    if (sum > point) return i;
  }
  while (n > 1 && !(weight_at(n - 1) > 0.0f)) --n;
  return n - 1;
}

int32_t DrawFromAll(const float* weights, int32_t n, double point) {
  double sum = 0.0;
  int32_t first = 0;
  for (; first + kSummed < n; first += kSummed) {
    const double next = sum + SumBlock(weights + first, kSummed);
    if (next > point) break;
    sum = next;
  }
  return FindPoint(first, n, sum, point, [&](int32_t i) { return weights[i]; });
}

}  // namespace

double LogSumExp(const KernelTable& kernels, const float* logits, int32_t n, float top) {
  float weights[kSummed];
  double total = 0.0;
  for (int32_t i = 0; i < n; i += kSummed) {
    const int32_t n_block = std::min(kSummed, n - i);
    kernels.weigh_logits(logits + i, n_block, top, 1.0f, weights);
    for (int32_t j = 0; j < n_block; ++j)
      total += weights[j] < kSmall ? weights[j] : exp(static_cast<double>(logits[i + j]) - top);
  }
  return top + log(total);
}

void Sampler::Reserve(int32_t n) {
  const size_t size = static_cast<size_t>(n);
  if (weights_.size() < size) weights_.resize(size);
  if (ids_.size() < size) ids_.resize(size);
  cut_.reserve(size);
  buckets_.resize(kNumKeys);
}

// Keeps those of n ids that `is_kept` names, without a branch on what it says. Returns how many.
template <typename IsKept>
int32_t Sampler::Keep(int32_t n, const IsKept& is_kept) {
  int32_t n_kept = 0;
  for (int32_t i = 0; i < n; ++i) {
    const int32_t id = ids_[i];
    ids_[n_kept] = id;
    n_kept += is_kept(id);
  }
  return n_kept;
}

int32_t Sampler::Draw(const KernelTable& kernels, const Distribution& d, double uniform) {
  float* weights = weights_.data();
  kernels.weigh_logits(d.logits, d.n, d.top, d.temperature, weights);
  const double total = SumAll(weights, d.n);
  int32_t n = d.n;
  if (d.top_p < 1.0)
    n = FindNucleus(kernels, d.n, total, d.top_p);
  else if (d.min_p > 0.0f)
    n = kernels.find_likely(weights, d.n, d.min_p, ids_.data());
  else
    return DrawFromAll(weights, d.n, uniform * total);
  if (d.min_p > 0.0f) n = Keep(n, [&](int32_t id) { return weights[id] >= d.min_p; });
  double sum = 0.0;
  for (int32_t i = 0; i < n; ++i) sum += weights[ids_[i]];
  return ids_[FindPoint(0, n, 0.0, uniform * sum, [&](int32_t i) { return weights[ids_[i]]; })];
}

// Writes the ids of the fewest largest weights that sum to top_p of all to ids_. Returns how many.
int32_t Sampler::FindNucleus(const KernelTable& kernels, int32_t n, double total, double top_p) {
  const float* weights = weights_.data();
  float bound = kLikely;
  int32_t n_likely = 0;
  double likely = 0.0;
  const auto find = [&] {
    n_likely = kernels.find_likely(weights, n, bound, ids_.data());
    std::fill(buckets_.begin() + KeyOf(bound), buckets_.end(), 0.0);
    likely = 0.0;
    for (int32_t i = 0; i < n_likely; ++i) {
      const float weight = weights[ids_[i]];
      buckets_[KeyOf(weight)] += weight;
      likely += weight;
    }
  };
  find();
  if (likely < top_p * total) {
    // Weights below (1 - top_p) / n of the total sum to less than 1 - top_p of it. So the others
    // reach top_p without them. The bound is halved so that rounding does not matter.
    bound = static_cast<float>(0.5 * (1.0 - top_p) * total / n);
    find();
  }
  const uint32_t least = KeyOf(bound);
  uint32_t key = kNumKeys - 1;
  double missing = top_p * total;
  for (; key > least && buckets_[key] < missing; --key) missing -= buckets_[key];
  return CutBucket(key, missing, n_likely);
}

// Removes what is behind the point of the bucket where its falling weights reach `missing`. Returns
// how many ids are left.
int32_t Sampler::CutBucket(uint32_t key, double missing, int32_t n_likely) {
  const float* weights = weights_.data();
  cut_.clear();
  for (int32_t i = 0; i < n_likely; ++i)
    if (const float weight = weights[ids_[i]]; KeyOf(weight) == key) cut_.push_back(weight);
  if (cut_.empty()) return n_likely;  // rounding left a rest of all weights
  std::sort(cut_.begin(), cut_.end(), std::greater<float>());
  size_t n_taken = 0;
  while (n_taken == 0 || (n_taken < cut_.size() && missing > 0.0)) missing -= cut_[n_taken++];
  const float least = cut_[n_taken - 1];
  auto n_equal = std::count(cut_.begin(), cut_.begin() + n_taken, least);
  return Keep(n_likely, [&](int32_t id) {
    return weights[id] > least || (weights[id] == least && n_equal-- > 0);
  });
}

}  // namespace hybrid
