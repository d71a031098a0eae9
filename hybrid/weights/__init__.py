"""Weights in memory: their formats, the packed model (`packing`) and its files (`packed_file`)."""
