"""Which neurons will fire? A leaf package: it knows arrays, never imports hybrid.

Nothing lives here yet. The engine computes every gate exactly and skips what the gate says is zero;
a predictor will be worth its bytes where it names the active neurons with less than the gate rows
cost.
"""
