"""payloads.bin: every payload that arrived, and the same file after a run was cut short."""

import os
import signal
from pathlib import Path

import pytest
import tiny

from fedlq_ray import ConfigError, resume, simulate
from fedlq_ray.federation.events import RoundDone
from fedlq_ray.quantization.wire import bodies
from fedlq_ray.runs.payloads import NAME, PayloadFile, count, read

KINDS = {
    "synchronous": {"strategy": {"name": "fedlq_rd"}, "clients": {"dropout": 0.3}},
    "asynchronous": {"strategy": {"name": "uniform"}, "server": {"buffer": 2, "max_staleness": None}},
}


def config(out: Path, kind: str, **more):
    return tiny.config(out, **{"rounds": 6, "payloads": True, "checkpoint": {"every_rounds": 2}, **KINDS[kind], **more})


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_same_file(kind, tmp_path):
    def cut(event):
        if isinstance(event, RoundDone) and event.record.round == 3:
            os.kill(os.getpid(), signal.SIGINT)

    whole = simulate(config(tmp_path / "whole", kind))
    with pytest.raises(KeyboardInterrupt):
        simulate(config(tmp_path / "cut", kind), watch=cut)
    *_, newest = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    newest.unlink()  # as if killed before it was written
    with (tmp_path / "cut" / NAME).open("ab") as stream:
        stream.write(b"torn")  # and while writing
    resume(tmp_path / "cut")
    assert (tmp_path / "cut" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()
    kept = list(read(tmp_path / "whole"))
    assert len(kept) == count(tmp_path / "whole") == whole.history["answered"].map(len).sum()
    assert all(bodies(payload) for payload in kept)
    if kind == "synchronous":
        assert sum(map(len, kept)) == whole.summary["uplink_bytes"]


def test_payloads_change_no_result_and_are_not_kept_by_default(tmp_path):
    kept, bare = (simulate(config(tmp_path / str(on), "synchronous", payloads=on)).summary for on in (True, False))
    assert kept == bare and not (tmp_path / "False" / NAME).exists()
    with pytest.raises(ConfigError, match="payloads=true"):
        count(tmp_path / "False")


def test_steps_from_a_round_on_and_what_is_torn_are_dropped(tmp_path):
    with PayloadFile(tmp_path, 0, True) as file:
        file.write(0, [b"a", b"bc"])
        file.write(1, [])
        file.write(2, [b"def"])
    with (tmp_path / NAME).open("ab") as stream:
        stream.write(b"\x03\0\0\0\xff\0\0\0half")  # a payload of 255 bytes, of which 4 were written
    assert list(read(tmp_path)) == [b"a", b"bc", b"def"]
    with PayloadFile(tmp_path, 2, False) as file:
        file.write(2, [b"not kept"])
    assert list(read(tmp_path)) == [b"a", b"bc"] and (tmp_path / NAME).stat().st_size == 2 * 8 + 3
