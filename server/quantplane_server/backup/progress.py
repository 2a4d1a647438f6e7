"""What a person sees meanwhile, on standard error."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status


class Progress:
    """One line that changes on a terminal; elsewhere a line for each step."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._status: Status | None = None
        self._step = ""

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._status:
            self._status.stop()

    def step(self, text: str) -> None:
        """Tell what begins now."""
        self._step = text
        if self._status:
            self._status.update(text)
        else:
            self._console.print(text, soft_wrap=True)

    def detail(self, text: str) -> None:
        """Tell how far the step is, where that does not make a line of its own."""
        if self._status:
            self._status.update(f"{self._step}: {text}")

    def bytes(self, count: int) -> None:
        self.detail(f"{count / 1e6:,.0f} MB")
