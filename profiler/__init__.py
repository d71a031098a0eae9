"""Records which neurons of a model fire, and how often.

This is the top package: it may import hybrid and predictors.
"""
