"""The one exception type for mistakes a user can make."""


class UserError(Exception):
    """Something a user can put right: one sentence that says what was wrong, where, and what to do.

    Scripts print the sentence and exit with status 2; library callers catch it like any exception.
    """
