// Draws a token from the logits of a whole vocabulary.
#pragma once

#include <stdint.h>

#include <vector>

#include "kernels/kernels.h"

namespace hybrid {

struct Distribution {
  const float* logits;
  int32_t n;
  float top;          // the largest logit, which is finite
  float temperature;  // above 0
  double top_p;       // keep the fewest likeliest tokens that have this share; 1: all
  float min_p;        // then keep tokens that are at least so likely, relative to the likeliest
};

// Weights are exp((logit - top) / temperature): probabilities up to a factor, the largest is 1. The
// results have the same bits on every ISA with fused multiply-add.
class Sampler {
 public:
  // Makes room for n logits. May throw; Draw() does not.
  void Reserve(int32_t n);
  // Returns the index whose share of what is kept contains `uniform` in [0, 1), ids ascending. If
  // weights at a cut are equal, the lowest ids are kept.
  int32_t Draw(const KernelTable& kernels, const Distribution& distribution, double uniform);

 private:
  template <typename IsKept>
  int32_t Keep(int32_t n, const IsKept& is_kept);
  int32_t FindNucleus(const KernelTable& kernels, int32_t n, double total, double top_p);
  int32_t CutBucket(uint32_t key, double missing, int32_t n_likely);

  std::vector<float> weights_;
  std::vector<int32_t> ids_;     // of the weights that are left, ascending
  std::vector<double> buckets_;  // sums of the weights that have a key
  std::vector<float> cut_;       // those of the bucket in which the nucleus ends
};

// The natural logarithm of the sum of exp(logit), where `top` is the largest of n logits. It is
// exact to about 1e-9.
double LogSumExp(const KernelTable& kernels, const float* logits, int32_t n, float top);

}  // namespace hybrid
