"""What every campaign shares: attempts by number, their outcomes counted, failures kept with what makes them again.

A campaign is a file of this folder: a test that makes a few attempts, and a command that makes as many as wanted:

    python tests/reliability/test_damaged_images.py --count 1000 --seed 0 --out images.json

An attempt is a function of a random generator, seeded by (seed, number), that returns the name of its outcome. What may happen:
right (used, and the result is what it should be), refused (a ValueError or OSError of one line), noted (used in part, and said
so). Anything else fails the campaign.
"""

import argparse
import json
import os
import platform
import resource
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ALLOWED = ("right", "refused", "noted")
MOST_SECONDS = 60.0  # of an attempt


def refusal(error: Exception) -> str:
    """Return "refused" for an error as users should see it; else say what is wrong with it."""
    if isinstance(error, ValueError | OSError) and str(error) and "\n" not in str(error):
        return "refused"
    return f"{type(error).__name__}: {str(error)[:200]!r}"


def apart(look: Callable[[], str], most_bytes: float = 1.5e9) -> str:
    """Return the outcome of `look` in a process of its own, or what became of it: killed, endless, or too large."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            outcome = look()
        except BaseException as error:
            outcome = refusal(error) if isinstance(error, Exception) else type(error).__name__
            if outcome != "refused":
                outcome += "".join(traceback.format_tb(error.__traceback__)[-2:])
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # KiB on Linux
        os.write(writing, (outcome if grown <= most_bytes else f"took {grown / 1e9:.1f} GB").encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        if not select.select([answer], [], [], MOST_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
        outcome = answer.read().decode()
    status = os.waitpid(child, 0)[1]
    return outcome or f"ended by signal {os.WTERMSIG(status)}"


def run(
    attempt: Callable[[np.random.Generator], str], count: int, seed: int = 0, first: int = 0, minutes: float = 1e9
) -> dict[str, Any]:
    """Make attempts, none after `minutes`, and count their outcomes.

    Returns:
        counts: Number of each outcome.
        failures: Number, outcome and where it was raised, of those that are not allowed.
        slowest: Seconds of the slowest attempt.
    """
    counts: Counter[str] = Counter()
    failures, slowest, began = [], 0.0, time.monotonic()
    for number in range(first, first + count):
        if time.monotonic() - began > 60 * minutes:
            break
        start, where = time.perf_counter(), ""
        try:
            outcome = attempt(np.random.default_rng([seed, number]))
        except Exception as error:
            outcome = refusal(error)
            where = "".join(traceback.format_tb(error.__traceback__)[-2:])
        seconds = time.perf_counter() - start
        slowest = max(slowest, seconds)
        if seconds > MOST_SECONDS:
            outcome = f"took {seconds:.0f} s"
        counts[outcome if outcome in ALLOWED else "failed"] += 1
        if outcome not in ALLOWED:
            failures.append({"number": number, "outcome": outcome, "where": where})
    return {"counts": dict(counts), "failures": failures, "slowest": round(slowest, 2)}


def main(
    campaigns: dict[str, tuple[Callable[[np.random.Generator], str], int]], more: Callable[[], dict[str, Any]] = dict
) -> None:
    """Run campaigns by name, each an attempt and its usual number of them, from the command line; exit by 1 if one failed.

    Args:
        campaigns: Attempts and numbers, by name.
        more: Gives, at the end, what else to tell and write.
    """
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(campaigns), help=f"which of {', '.join(campaigns)}")
    parser.add_argument("--count", type=int, help="attempts at each (default: its usual number)")
    parser.add_argument("--first", type=int, default=0, help="number of the first attempt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no attempt after these")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    results = {}
    for name in args.names:
        attempt, usual = campaigns[name]
        results[name] = run(attempt, args.count or usual, args.seed, args.first, args.minutes)
        print(name, results[name]["counts"], f"slowest {results[name]['slowest']} s", flush=True)
        for failure in results[name]["failures"][:5]:
            print(f"  {failure['number']}: {failure['outcome']}\n{failure['where']}")
    if more():
        print(json.dumps(more()))
    if args.out:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        stamp = {
            "command": f"python {Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}",
            "date": f"{date.today()}",
            "machine": machine,
        }
        args.out.write_text(json.dumps({**stamp, "results": results, **more()}, indent=1))
    sys.exit(any(result["failures"] for result in results.values()))
