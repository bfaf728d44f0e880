"""Writes runs that were cut short, as later versions must be able to read: `python tests/runs/golden/make.py NAME`.

A version that changes what it writes adds runs of its own; those that are here stay as they are.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from faults import SMALL, die, in_child

from fedlq_ray import simulate
from fedlq_ray.config.load import load
from fedlq_ray.federation.events import Event, RoundDone

KINDS = {
    "fedlq": ["strategy.name=fedlq", "strategy.probe_every=1", "strategy.probe_samples=16"],
    "rd": ["strategy.name=fedlq_rd", "network.downlink_bits=1", "strategy.metric=fisher", "server.optimizer=adam"],
    "ef21": ["strategy.name=ecsq", "strategy.error_feedback=ef21", "strategy.bits=1"],
}

if __name__ == "__main__":
    for kind, settings in KINDS.items():
        out = Path(__file__).parent / f"{sys.argv[1]}-{kind}"

        def run(out: Path = out, settings: list[str] = settings) -> None:
            def watch(event: Event, rounds: list[int] = []) -> None:  # noqa: B006
                rounds.append(isinstance(event, RoundDone))
                if sum(rounds) == 3:
                    die()

            small = [*SMALL, "model.args={hidden: [6]}", "checkpoint.keep=1", f"out={out}", *settings]
            simulate(load(None, small), watch=watch)

        in_child(run)
        (out / ".lock").unlink()
        text = (out / "config.yaml").read_text().splitlines(keepends=True)
        (out / "config.yaml").write_text("".join(line for line in text if not line.startswith("out:")))
