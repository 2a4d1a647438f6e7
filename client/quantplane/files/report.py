"""What became of a file: the rows refused, or why it is refused as a whole."""

from dataclasses import dataclass, field

REFUSALS_KEPT = 20
# A file whose first rows are all refused, this many, was described wrongly.
HOPELESS_ROWS = 100


class FileProblem(Exception):
    """The file cannot be read as it was described."""


@dataclass(frozen=True)
class Refusal:
    """A row left out, and the number of its line (in Parquet: its row) from 1."""

    line: int
    reason: str


@dataclass
class Report:
    """What became of a file's rows; kept current while the file is read."""

    read: int = 0
    refused: int = 0
    # Only the first ones, so that a broken file does not fill the memory.
    refusals: list[Refusal] = field(default_factory=list)
    unit: str = "line"  # or "row": what the refusals are numbered by
    # The share of the file that has been read, 0 to 1.
    progress: float = 0.0

    def refuse(self, line: int, reason: str) -> None:
        self.refused += 1
        if len(self.refusals) < REFUSALS_KEPT:
            self.refusals.append(Refusal(line, reason))

    def check_hope(self) -> None:
        """Raise FileProblem if not one of the first rows can be read."""
        if self.refused == self.read == HOPELESS_ROWS:
            first = self.refusals[0]
            raise FileProblem(
                f"none of the first {HOPELESS_ROWS} rows can be read; "
                f"{self.unit} {first.line}: {first.reason}"
            )


def shown(text: str) -> str:
    """Return the text quoted, and cut if it is long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
