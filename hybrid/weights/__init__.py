"""Weights in memory: formats (`quant`), the model's tensors (`model_weights`), the packed model
(`packed`).
"""
