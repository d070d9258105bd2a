"""The errors a user can meet, grouped by what the user does next. Each message says what, where, and how to mend it."""


class MtpdError(Exception):
    """Base of every error whose message is meant for the user; the command line prints it without a traceback."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class RecipeError(MtpdError):
    """The recipe, or a file it names, must be edited."""


class TeacherLoadError(MtpdError):
    """The teacher's config and checkpoint do not fit each other, or its outputs cannot be used as targets."""


class StaleCacheError(MtpdError):
    """The cache holds targets of something else than what was asked for; the message lists the fields that differ."""


class MissingRowsError(MtpdError, KeyError):
    """Rows are not committed: resume the precompute."""


class CorruptShardError(MtpdError):
    """Stored bytes are damaged: repair the unit."""


class LeaseHeldError(MtpdError):
    """Another run writes this teacher's targets: wait for it, or stop it."""


class BudgetError(MtpdError):
    """The plan does not fit the disk."""


class StorageError(MtpdError):
    """The object storage does not answer: look at the network or the service, then run the same command again."""
