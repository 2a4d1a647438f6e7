"""Backups: written while the servers go on, restored only whole, and checked.

`quantplane-server backup` and `restore`. A backup is one file, of all tables or of
some; docs/backup-restore.md says how to work with it.
"""

from .errors import BackupError
from .manifest import Manifest
from .progress import Progress
from .restore import restore
from .source import backup
from .target import Terms

__all__ = ["BackupError", "Manifest", "Progress", "Terms", "backup", "restore"]
