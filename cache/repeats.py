"""How often requests to a storage were repeated in this process: a plain number, for whoever measures."""

_count = 0


def count_repeat() -> None:
    """Count a request that is made again. A lost count between threads does no harm."""
    global _count  # the process's
    _count += 1


def repeated_requests() -> int:
    """Requests that were made again since this process began, by us; what the client repeats itself is not seen."""
    return _count
