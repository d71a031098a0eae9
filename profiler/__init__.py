"""Watch the model run: which neurons fire, and how often. The top package: it may import hybrid and
predictors.
"""
