"""Records which neurons of a model fire, and how often.

This is the top package: it may import hybrid and predictors.
"""

import hybrid  # noqa: F401 - before all else, because then Ctrl-C prints no traceback
