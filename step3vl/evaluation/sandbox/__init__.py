"""Run programs that a model wrote: in namespaces of their own, within limits, with no way to claim success.

`run` feeds a program on stdin and returns what it printed; `call` sends arguments in and gets return values out.
Expected answers never enter the sandbox: they are compared by the caller, with `same_value` or on the text printed.
"""

from .execute import call, run
from .isolation import is_isolated, missing_isolation
from .outcome import Limits, Outcome, same_value
from .places import PACKAGES

__all__ = ["PACKAGES", "Limits", "Outcome", "call", "is_isolated", "missing_isolation", "run", "same_value"]
