"""Measure locustfile.py beside other load generators.

    python benchmarks/run.py                            everything, into RESULTS.md, in about
                                                        45 minutes
    python benchmarks/run.py --quick                    a trial, whose figures mean nothing
    python benchmarks/run.py --only delivery            printed only
    python benchmarks/run.py --only delivery --write    its rows of RESULTS.md, made anew

``README.md`` says what the names mean and how it is measured.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import traceback

from comparisons import COMPARISONS
from harness import Bench, Skipped
from table import line, table, write


def measure(bench: Bench, name: str) -> list[str]:
    """Make a comparison and return its lines of the table."""
    when = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}; {os.getloadavg()[0]:.1f}"
    rows = COMPARISONS[name](bench)
    return [line([f"`{name}`", *row.cells(), when]) for row in rows]


def main() -> None:
    """Run what is asked for; the exit code is 1 if a comparison failed."""
    parser = argparse.ArgumentParser(
        description="Measure locustfile.py beside other load generators."
    )
    parser.add_argument("--quick", action="store_true", help="only a trial: no figures")
    parser.add_argument(
        "--only", nargs="+", choices=COMPARISONS, metavar="NAME", help="%(choices)s"
    )
    parser.add_argument("--write", action="store_true", help="write the rows of --only, too")
    options = parser.parse_args()
    if options.quick and options.write:
        parser.error("the figures of --quick mean nothing: leave out --write")
    for number in (signal.SIGINT, signal.SIGTERM):  # so that what was started is ended
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    writes = options.write or not (options.only or options.quick)
    lines: dict[str, list[str]] = {}
    failed = []
    with Bench(quick=options.quick, writes=writes) as bench:
        for name in options.only or COMPARISONS:
            print(f"{name} …", file=sys.stderr)
            try:
                lines[name] = measure(bench, name)
            except Skipped as reason:
                print(f"{name} skipped: {reason}", file=sys.stderr)
            except Exception:  # whatever it is, the other comparisons can still be made
                traceback.print_exc()
                failed.append(name)
            bench.end_all()
            if writes:  # after each, as a later one may take long
                write(lines, COMPARISONS)
    print(table(lines, COMPARISONS))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
