"""Which neurons will fire? A leaf package: it knows arrays, never imports hybrid.

The engine computes every gate exactly and skips what the gate says is zero. A predictor names the
neurons that may fire, for less than all gate rows cost; the only error is one that it misses.

trace.py        what the profiler recorded for training
predictors.py   the kinds: low rank, sign; how good one is
lowrank.py      training (torch)
selection.py    the cheapest that reaches a recall, layer by layer
file.py         a model's predictors in one file
train.py, evaluate.py   the commands
"""
