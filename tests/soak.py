"""Many rounds, and whether memory grows: `python tests/soak.py --rounds 500`, with `--kind` or key=value.

Every tenth round the memory (PSS) of this program, the driver and the client actors is read. A line of JSON tells each
one's megabytes at a fifth of the rounds and at the end, and the slope of the least-squares line between.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from faults import KINDS, workers

import fedlq_ray
from fedlq_ray.config.load import load
from fedlq_ray.federation.events import Event, RoundDone

SETTINGS = (
    "clients.count=40", "clients.cohort=10", "clients.hosting=packed", "tracking.uri=null", "train.local_epochs=1",
    "checkpoint.every_rounds=10",
)  # fmt: skip
STATE = (
    "strategy.name=fedlq_rd", "strategy.error_feedback=true", "strategy.metric=fisher", "strategy.probe_every=5",
    "network.downlink_bits=1",
)  # fmt: skip


def pss_mb(pids: list[int]) -> float:
    """Proportional memory of some processes together."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--kind", choices=KINDS, help="settings of tests/faults.py, on top of those here")
    parser.add_argument("settings", nargs="*", default=STATE, help="key=value, in place of FedLQ-RD with much state")
    given = parser.parse_args()
    settings = (*SETTINGS, *given.settings, *KINDS.get(given.kind, ()), f"rounds={given.rounds}")
    os.environ["RAY_ADDRESS"] = "local"
    seen: list[tuple[int, float, float, float]] = []

    def watch(event: Event) -> None:
        if isinstance(event, RoundDone) and event.record.round % 10 == 9:
            here = os.getpid()
            seen.append(
                (
                    event.record.round,
                    pss_mb([here]),
                    pss_mb(workers("Driver", here)),
                    pss_mb(workers("ClientActor", here)),
                )
            )

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fedlq_ray.simulate(load(None, [*settings, f"out={folder}/run"]), watch=watch)
    found: dict[str, object] = {"kind": given.kind, "rounds": given.rounds, "s": round(time.perf_counter() - started)}
    late = np.array([row for row in seen if row[0] >= given.rounds / 5])
    for column, name in enumerate(("program", "driver", "client_actors"), 1):
        slope = np.polyfit(late[:, 0], late[:, column], 1)[0]
        found[name] = {
            "mb_at_a_fifth": round(late[0, column], 1),
            "mb_at_the_end": round(late[-1, column], 1),
            "mb_per_100_rounds": round(100 * slope, 2),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
