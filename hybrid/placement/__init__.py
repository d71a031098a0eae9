"""Measure this machine, and decide which device holds which part of a model."""
