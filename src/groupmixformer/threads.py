"""How many CPU threads a network runs in: the number that is measured to be the fastest beside what else is at work.

The threads of an operation wait for each other at its end. Where another program takes the core of one, all wait, and a network
of many small operations becomes tens of times slower: then fewer threads are faster.
"""

import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

ROUNDS = 4  # in which each number gets a step; the first one warms up
HOPELESS = 4.0  # times as long as the fastest: gets no further steps
SLOW = 3.0  # times as long as usual, in two steps after each other: measured again
USUAL = 50  # steps whose median is usual
AGAIN = 600.0  # seconds after which fewer than all threads are measured again, as what took the cores may have ended


class ThreadChoice:
    """Chooses among all threads, half of them and one, by the seconds that steps take, and says so on stderr.

    Call `use` before a step and `took` after it. The number changes how sums are rounded.

    Args:
        fixed: The number, if it is not to be chosen.

    Attributes:
        number: Threads that were chosen; all before that.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.number = self.most = fixed or torch.get_num_threads()
        self.chooses = fixed is None and self.most > 1
        self.since = time.monotonic()
        self.usual: list[float] = []  # seconds of the last steps
        self.times: dict[int, list[float]] = {}  # while numbers are measured, the seconds of each
        self.ratios: dict[int, float] = {}
        if self.chooses:
            self._measure()

    def _measure(self) -> None:
        self.times, self.ratios = {self.most: [], max(1, self.most // 2): [], 1: []}, {}

    @property
    def _next(self) -> int:
        return min(self.times, key=lambda number: len(self.times[number]), default=self.number)

    def use(self) -> None:
        """Set the number of threads for the next step."""
        if torch.get_num_threads() != self._next:
            torch.set_num_threads(self._next)

    def took(self, seconds: float) -> None:
        """Take the seconds of a step, or of what is the same work in every step."""
        if self.times:
            self._compare(seconds)
        elif self.chooses:
            self.usual = [*self.usual[-USUAL:], seconds]
            before, last = self.usual[:-2], self.usual[-2:]
            slow = len(before) >= ROUNDS - 1 and min(last) > SLOW * statistics.median(before)
            if slow or (self.number < self.most and time.monotonic() - self.since > AGAIN):
                self._measure()

    def _compare(self, seconds: float) -> None:
        self.times[self._next].append(seconds)
        if len(counts := {len(times) for times in self.times.values()}) > 1 or counts == {1}:
            return
        medians = {number: statistics.median(times[1:]) for number, times in self.times.items()}
        best = min(medians, key=medians.__getitem__)
        self.ratios |= {number: median / medians[best] for number, median in medians.items() if number != best}
        self.times = {number: self.times[number] for number in medians if medians[number] < HOPELESS * medians[best]}
        if len(self.times) > 1 and counts != {ROUNDS}:
            return
        if best != self.number or not self.usual:  # the first choice, or another
            others = ", ".join(f"{ratio:.1f} times as long with {number}" for number, ratio in self.ratios.items())
            print(f"threads: {best} of {self.most} (a step takes {others}); --threads N fixes the number", file=sys.stderr)
        self.number, self.usual, self.times, self.since = best, self.times[best][1:], {}, time.monotonic()

    def watch(self, network: nn.Module) -> None:
        """Choose for each call of a network, by its seconds for each value of the images that it takes."""

        def begin(*_: Any) -> None:
            self.use()
            self.start = time.perf_counter()

        def end(_: nn.Module, inputs: Any, __: Any) -> None:
            self.took((time.perf_counter() - self.start) / sum(image.numel() for image in inputs[0]))

        network.register_forward_pre_hook(begin)
        network.register_forward_hook(end)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on with."""
        return {name: getattr(self, name) for name in ("most", "number", "usual", "times", "ratios")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what was chosen, or half measured, where there are as many threads as there were."""
        if self.chooses and state["most"] == self.most:
            vars(self).update(state)
