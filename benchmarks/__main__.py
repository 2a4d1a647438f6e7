"""Runs the benchmarks, shows them as a table, and writes `build/bench.json`."""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import (
    auth,
    bars,
    daily,
    fanout,
    hypertable,
    idle,
    latency,
    orders,
    portfolio,
    recording,
    resuming,
    slow_reader,
    tracing,
)
from benchmarks.harness import BUILD, LOG, Bench, Figure, Lab

RUN_S = 480.0  # for all
EACH_S = 90.0


class Goal(NamedTuple):
    """What a figure's value or ratio is meant to be."""

    what: str
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        if self.least is not None:
            return f"{self.what} ≥ {self.least:g}"
        return f"{self.what} ≤ {self.most:g}"

    def met(self, figure: Figure) -> bool:
        number: float = getattr(figure, self.what)
        if self.least is not None:
            return number >= self.least
        return self.most is None or number <= self.most


class Benchmark(NamedTuple):
    run: Callable[[Bench], Awaitable[Figure]]
    baseline: str  # what it is compared with
    goal: Goal | None = None


BENCHMARKS = {
    "fanout_vs_raw": Benchmark(
        fanout.vs_raw, "bare grpc.aio, ready batches", Goal("ratio", least=0.5)
    ),
    "fanout_vs_naive": Benchmark(
        fanout.vs_naive, "bare grpc.aio, a quote a message", Goal("ratio", least=20)
    ),
    "slow_reader_cost": Benchmark(
        slow_reader.cost, "without the slow reader", Goal("ratio", least=0.9)
    ),
    "latency_vs_floor": Benchmark(
        latency.vs_floor, "XADD → XREAD + a call", Goal("ratio", most=3)
    ),
    "resume_10k_s": Benchmark(
        resuming.resume, "XRANGE of the same", Goal("value", most=1)
    ),
    "record_vs_copy": Benchmark(
        recording.vs_copy, "asyncpg COPY, 10,000 a commit", Goal("ratio", least=0.6)
    ),
    "history_vs_asyncpg": Benchmark(
        bars.vs_asyncpg, "asyncpg into numpy", Goal("ratio", least=0.5)
    ),
    "daily_vs_rows": Benchmark(
        daily.vs_rows, "SQL on the rows, asyncpg", Goal("ratio", least=20)
    ),
    "idle_subscription_kb": Benchmark(idle.subscription, "bare handler that waits"),
    "hypertable_vs_plain": Benchmark(
        hypertable.vs_plain, "the same COPY into a plain table"
    ),
    "submit_vs_floor": Benchmark(
        orders.vs_floor, "a bare call + an INSERT", Goal("ratio", most=2.5)
    ),
    "report_vs_floor": Benchmark(orders.report_vs_floor, "a bare call + an INSERT"),
    "orders_vs_transaction": Benchmark(
        orders.vs_transaction, "bare transactions, one an order"
    ),
    "orders_coalesced_vs_single": Benchmark(
        orders.coalesced_vs_single, "one in flight", Goal("ratio", least=2)
    ),
    "auth_vs_none": Benchmark(
        auth.vs_none, "the same call, QUANTPLANE_AUTH=false", Goal("ratio", most=1.15)
    ),
    "tracing_call_cost": Benchmark(
        tracing.of_a_call, "the same, not traced", Goal("ratio", most=1.05)
    ),
    "tracing_quote_cost": Benchmark(
        tracing.of_a_quote, "the same, not traced", Goal("ratio", most=1.05)
    ),
    "portfolio_cost": Benchmark(
        portfolio.cost, "without a watched portfolio", Goal("ratio", least=0.8)
    ),
}


async def measure(names: list[str], console: Console) -> tuple[dict[str, Figure], bool]:
    """Run benchmarks one after another; return the figures, and whether all ran."""
    figures = {}
    deadline = monotonic() + RUN_S
    with console.status("starting PostgreSQL and Valkey") as status:
        async with Lab.open() as lab:
            for name in names:
                began = monotonic()
                left_s = min(EACH_S, deadline - began)

                def note(text: str, name: str = name) -> None:
                    status.update(f"{name}: {text}")

                note("starting")
                try:
                    async with asyncio.timeout(left_s), lab.bench(note) as bench:
                        figures[name] = await BENCHMARKS[name].run(bench)
                except TimeoutError:
                    console.print(f"[red]{name}: not done in {left_s:.0f} s[/]")
                except Exception as error:
                    console.print(f"[red]{name}: {error!r}[/] (see {LOG})")
                else:
                    ratio = f"{figures[name].ratio:.3g}"
                    took = f"{monotonic() - began:.0f} s"
                    console.print(f"{name}: ratio {ratio} [dim]({took})[/]")
    return figures, len(figures) == len(names)


def table(figures: dict[str, Figure]) -> Table:
    shown = Table(
        caption=f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the end; "
        "medians of rounds in turns with the baseline",
    )
    shown.add_column("benchmark", no_wrap=True)
    for column in ("value", "baseline", "ratio"):
        shown.add_column(column, justify="right", no_wrap=True)
    for column in ("goal", "", "compared with"):
        shown.add_column(column)
    for name, figure in figures.items():
        _, baseline, goal = BENCHMARKS[name]
        met = (
            ("[green]met[/]" if goal.met(figure) else "[red]missed[/]") if goal else ""
        )
        numbers = _numbers(figure.value, figure.baseline, figure.unit)
        shown.add_row(name, *numbers, str(goal or ""), met, baseline)
        if p99 := figure.extra.get("p99"):
            numbers = _numbers(p99, figure.extra["baseline_p99"], figure.unit)
            shown.add_row("  its p99", *numbers)
    return shown


def _numbers(value: float, baseline: float, unit: str) -> tuple[str, str, str]:
    return (
        f"{_readable(value)} {unit}",
        f"{_readable(baseline)} {unit}",
        _readable(value / baseline),
    )


def _readable(number: float) -> str:
    """Return 2.83M, 24.5k, 123, 1.15 or 0.0042: three digits that count."""
    for size, sign in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + sign
    return f"{number:.3g}"


def main() -> int:
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        print(f"no such benchmark: {', '.join(unknown)}", file=sys.stderr)
        print(f"there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 120)
    figures, complete = asyncio.run(measure(names, console))
    console.print(table(figures))
    path = BUILD / "bench.json"
    contents = {name: figure.as_json() for name, figure in figures.items()}
    path.write_text(json.dumps(contents, indent=2) + "\n")
    console.print(f"written to {path}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
