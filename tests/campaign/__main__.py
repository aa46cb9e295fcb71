"""`python -m tests.campaign`: run the campaign and print its table; the exit status is 1 if an outcome is bad."""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no input of the campaign asks a public server
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from . import adapter_cases, kills, machine, params_cases, project, properties, service_cases, source_cases
from .case import BAD, Tally, run_all

PARTS = ("inputs", "properties", "kills", "machine")


def main() -> int:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to run (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the kills and of the property-based search")
    parser.add_argument("--kills", type=int, default=100, help="number of kills")
    parser.add_argument("--examples", type=int, default=100, help="inputs per property, times its share")
    parser.add_argument("--folder", help="folder for temporary files, such as /dev/shm")
    options = parser.parse_args()
    tally, started = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign-", dir=options.folder) as name:
        home = Path(name)
        for part in options.only or PARTS:
            print(part, flush=True)
            (home / part).mkdir()
            RUN[part](home / part, options, tally)
    print(f"\n{tally.table()}\n\nseed {options.seed}, {time.monotonic() - started:.0f} s")
    print("\n".join(tally.problems))
    return int(any(counts[kind] for counts in tally.counts.values() for kind in BAD))


def inputs(home: Path, options: argparse.Namespace, tally: Tally) -> None:
    """The tables of bad inputs."""
    from conftest import concept_values, random_adapter, tiny_pipeline

    tiny_pipeline(home / "source").save_pretrained(home / "base")
    concepts = {"cat": concept_values(), "dog": concept_values("<new2>", "dog")}
    learned = random_adapter(home / "base", home / "learned", concepts=concepts)
    run_all(params_cases.cases(), home / "params", tally)
    run_all(source_cases.cases(), home / "sources", tally)
    run_all(service_cases.cases(), home / "services", tally)
    run_all(adapter_cases.cases(home / "base", learned), home / "adapters", tally)


def search(home: Path, options: argparse.Namespace, tally: Tally) -> None:
    """The property-based search."""
    for name, (_, _, share) in properties.PROPERTIES.items():
        tried, counterexample = properties.check(name, options.seed, options.examples * share)
        tally.add("properties", name, "right", count=tried - bool(counterexample))
        if counterexample:
            tally.add("properties", name, "traceback", counterexample)


def killed(home: Path, options: argparse.Namespace, tally: Tally) -> None:
    """The kills."""
    kills.run_all(home, options.seed, options.kills, tally)


def machines(home: Path, options: argparse.Namespace, tally: Tally) -> None:
    """Full disks, read-only folders, two runs at once, planted secrets."""
    ready, _ = kills.prepare(home)
    expected = project.digests(ready["done"])
    machine.two_at_once(home, ready["train"], expected, tally)
    machine.planted_secrets(home, ready["done"], tally)
    machine.read_only(home, ready["done"], tally)
    machine.full_disks(home, ready["download-data@cat"], expected, tally)


RUN = {"inputs": inputs, "properties": search, "kills": killed, "machine": machines}

if __name__ == "__main__":
    sys.exit(main())
