"""The one exception whose text is meant for a user's eyes."""


class UserError(Exception):
    """Something a user can mend: the message says what was wrong, where, and what would be right."""
