"""Cases, and their outcomes in forked processes."""

import os
import re
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from customdiff.errors import one_line_errors

KINDS = ("one line", "set aside", "right", "traceback", "hang", "wrongly accepted", "wrong")
BAD = KINDS[3:]
LIMIT = 20  # seconds per case
EITHER = "either"  # a case that may be accepted or refused, but only in one line


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        group: part of the campaign, such as `params.yaml`.
        name: shown if the outcome is bad.
        act: gives the input to the program; runs in an empty folder, which is its working folder.
        expected: pattern in the one line; empty if the input is set aside or used safely; `EITHER`.
        status: exit status of a refusal.
    """

    group: str
    name: str
    act: Callable[[], None]
    expected: str
    status: int = 1


@dataclass
class Tally:
    """Outcomes by group and kind, and a line on each bad one."""

    counts: dict[str, Counter] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, group: str, name: str, kind: str, detail: str = "", count: int = 1) -> None:
        """Count an outcome."""
        self.counts.setdefault(group, Counter())[kind] += count
        if kind in BAD:
            self.problems.append(f"{kind}: {group}: {name}: {detail}")

    def table(self) -> str:
        """The counts as a Markdown table."""
        rows = [["", "tried", *KINDS], ["---", *["---:"] * (len(KINDS) + 1)]]
        for group, counts in [*self.counts.items(), ("all", sum(self.counts.values(), Counter()))]:
            rows.append([group, str(sum(counts.values())), *(str(counts[kind]) for kind in KINDS)])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run_all(cases: Iterable[Case], home: Path, tally: Tally) -> None:
    """Run cases one after another, each in a folder of its own below `home`, which is removed."""
    for number, case in enumerate(cases):
        folder = home / f"case{number}" / "here"
        folder.mkdir(parents=True)
        status, output = run_forked(case.act, folder, LIMIT)
        beside = {path.name for path in folder.parent.iterdir()} - {"here", "output"}
        kind = "wrongly accepted" if beside else judge(case, status, output)
        tally.add(
            case.group, case.name, kind, f"{sorted(beside)} {status} {' / '.join(output.splitlines()[-4:])[-400:]}"
        )
        shutil.rmtree(folder.parent, ignore_errors=True)


def run_forked(act: Callable[[], None], folder: Path, limit: float) -> tuple[int | None, str]:
    """Exit status, None for a hang, and output of `act` in a forked process."""
    log = folder.parent / "output"
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os._exit(_status(act))
    deadline = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None, log.read_text(errors="replace")
        time.sleep(0.002)


def _status(act: Callable[[], None]) -> int:
    """The exit status that a program which runs `act` would have."""
    import sys

    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    try:
        with one_line_errors():
            act()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def judge(case: Case, status: int | None, output: str) -> str:
    """The kind of an outcome."""
    if status is None:
        return "hang"
    if status < 0 or status == 99 or "Traceback (most recent call last)" in output:
        return "traceback"
    if status == 0:
        return "set aside" if case.expected in ("", EITHER) else "wrongly accepted"
    if case.expected == EITHER:
        return "one line" if is_one_line(output) else "wrong"
    right = case.expected and re.search(case.expected, output) and status == case.status and is_one_line(output)
    return "one line" if right else "wrong"


def is_one_line(output: str) -> bool:
    """Whether the error is one line, or in params.yaml one line for each wrong key, or a usage error of the shell."""
    if re.search(r"^(Error: |Usage: )", output, re.MULTILINE):
        return True
    lines = output.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith("error: ")), None)
    return first is not None and all(line.startswith("params.yaml: ") for line in lines[first + 1 :])
