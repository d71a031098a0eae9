"""Predicts which neurons will fire. A leaf package: it handles arrays and never imports hybrid.

Without a predictor the engine computes every gate exactly, and skips neurons whose gate is zero. A
predictor names the neurons that may fire, and costs less than computing all gate rows. The only
possible error is a neuron that it misses.

trace.py        the profiler's recording, for training
predictors.py   low-rank predictors, and their quality
lowrank.py      their training (torch)
selection.py    the cheapest predictor that reaches a recall, layer by layer
file.py         a model's predictors in one file
interrupts.py   Ctrl-C in a command, here and in hybrid
reading.py, schema.py   how files are opened and their JSON is checked, here and in hybrid
writing.py      files that appear only when they are complete
train.py, evaluate.py   the commands
"""

from predictors import interrupts

if interrupts.is_our_command():  # before the other imports, which take longer
    interrupts.end_on_interrupt()
