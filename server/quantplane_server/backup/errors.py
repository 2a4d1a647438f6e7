class BackupError(RuntimeError):
    """A backup or a restore cannot be done: why, and what to do about it."""

    def __init__(self, why: str, hint: str = "") -> None:
        super().__init__(f"{why}\n  hint: {hint}" if hint else why)
