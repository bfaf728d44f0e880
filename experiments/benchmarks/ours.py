"""fedlq_ray's side: python ours.py KEY=VALUE ...; prints when each round ended, and what timing.json says besides."""

import json
import sys
import time

from harness import look

from fedlq_ray import simulate
from fedlq_ray.config.load import load
from fedlq_ray.federation.events import Event, Hosting, RoundDone


def main(settings: list[str]) -> None:
    marks: list[float] = []

    def watch(event: Event) -> None:
        if isinstance(event, Hosting | RoundDone):
            marks.append(time.time())
            if len(marks) == 1 + config.rounds:
                look()

    config = load(None, settings)
    result = simulate(config, watch=watch)
    timing = json.loads((result.path / "timing.json").read_text(encoding="utf-8"))
    parts = {name: timing[name] for name in ("round_s", "encode_s", "decode_s", "probe_s", "startup_s", "actors")}
    accuracy = result.summary["final_accuracy"]
    sent = result.summary["uplink_bytes"] / result.summary["rounds"]
    print(json.dumps({"marks": marks, "timing": parts, "final_accuracy": accuracy, "uplink_bytes_a_round": sent}))


if __name__ == "__main__":
    main(sys.argv[1:])
