"""The one exception that reaches a user as a single line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a config, a data file or a command line.

    The message is one line that names the place (parameter or ``file:line``), the rule, the value found and the
    remedy. The command line prints it without a traceback and exits with code 2.
    """
