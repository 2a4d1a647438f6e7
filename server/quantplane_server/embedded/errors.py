class EmbeddedError(Exception):
    """An embedded service cannot run; the message says why and what to do."""
