"""Coding payloads again: bytes by hand, what the coders themselves decode, and wrong input."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch

from fedlq_ray import ConfigError, simulate
from fedlq_ray.analysis.recode import CODERS, recode
from fedlq_ray.quantization import Eden, Float32, MinMax, QsgdElias, Segment, encode
from fedlq_ray.quantization.stochastic import StochasticStep
from fedlq_ray.runs.payloads import NAME, PayloadFile

FEDLQ = [sys.executable, "-m", "fedlq_ray.cli"]
OUR_HEADERS = 18 + 9


def folder(tmp_path, *payloads):
    """A run's folder that has kept these payloads, and nothing else."""
    (tmp_path / "config.yaml").touch()
    with PayloadFile(tmp_path, 0, True) as file:
        file.write(0, payloads)
    return tmp_path


def payload(vector, *segments):
    return encode(vector, segments, kind="update", round=0, client=0, rng=torch.Generator().manual_seed(0))


def test_bytes_of_one_bit_codes_by_hand(tmp_path):
    vector = torch.tensor([0.0, 1.0, 1.0, 1.0] * 64)  # both values are levels, so that rounding is exact
    found = recode(folder(tmp_path, payload(vector, Segment(MinMax(1), 0, 256))))
    (stream,) = found.streams
    assert (stream.quantizer, stream.coded, stream.elements, stream.segments) == ("MinMax", True, 256, 1)
    assert stream.sent == stream.coders["none"] == 9 + 32  # bits, low and step, then 256 bits
    bits = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))  # 0.811 per code
    assert stream.coders["entropy"] == pytest.approx(9 + 256 * bits / 8)
    # A word of 4 bytes may be begun, and the table has two frequencies of 2 bytes.
    assert 9 + 256 * bits / 8 + 4 <= stream.coders["range"] <= 9 + 256 * bits / 8 + 4 + 8
    assert stream.coders["zlib"] < 9 + 25  # it sees the period of four
    assert found.headers == OUR_HEADERS and found.sent == OUR_HEADERS + 41
    assert found.whole("none") == found.sent


def test_a_constant_layer_takes_its_scalars_alone(tmp_path):
    (stream,) = recode(folder(tmp_path, payload(torch.ones(100), Segment(MinMax(4), 0, 100)))).streams
    assert stream.coders["entropy"] == stream.coders["range"] == stream.coders["none"] == 9
    assert stream.sent == 9 + 50


def test_the_range_coder_is_near_the_entropy_of_entropy_coded_layers(tmp_path):
    vector = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    (stream,) = recode(folder(tmp_path, payload(vector, Segment(StochasticStep(1.0), 0, 20_000)))).streams
    assert stream.coded and stream.coders["entropy"] <= stream.coders["range"] <= 1.01 * stream.coders["entropy"] + 30
    assert stream.sent == pytest.approx(stream.coders["range"], rel=0.01)  # which is what it uses
    assert stream.coders["none"] == 7 + 20_000 * 4 / 8  # from -5 to 5: four bits


@pytest.mark.parametrize(
    ("quantizer", "coded"),
    [(Float32(), False), (Eden(2.0), False), (QsgdElias(7, 512), False), (QsgdElias(7, None), True)],
)
def test_what_has_no_codes_of_its_own_is_coded_as_bytes(quantizer, coded, tmp_path):
    vector = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    (stream,) = recode(folder(tmp_path, payload(vector, Segment(quantizer, 0, 2000)))).streams
    assert stream.coded is coded and (coded or stream.coders["none"] == stream.sent)
    assert set(stream.coders) == set(CODERS) and all(np.isfinite(size) for size in stream.coders.values())


def test_a_sample_is_evenly_spaced(tmp_path):
    found = recode(folder(tmp_path, *[payload(torch.zeros(n), Segment(MinMax(8), 0, n)) for n in range(1, 8)]), 3)
    assert (found.kept, found.payloads, found.streams[0].elements) == (7, 3, 1 + 4 + 7)


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path):
    def fedlq(*arguments):
        return subprocess.run([*FEDLQ, "recode", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)

    simulate(tiny.config(tmp_path / "kept", payloads=True, strategy={"name": "uniform"}))
    simulate(tiny.config(tmp_path / "bare"))
    shown = fedlq("kept")
    assert shown.returncode == 0 and "12 of 12 payloads" in shown.stdout and "entropy" in shown.stdout
    found = json.loads(fedlq("kept", "--json").stdout)
    assert found["coders"]["none"] == found["sent"] > found["coders"]["range"]
    for arguments, message in (
        (["bare"], "has no payloads.bin"),
        (["none"], "holds no run"),
        (["kept", "--sample=0"], ""),
    ):
        wrong = fedlq(*arguments)
        assert wrong.returncode == 2 and message in wrong.stderr, wrong.stderr
    whole = (tmp_path / "kept" / NAME).read_bytes()
    (tmp_path / "kept" / NAME).write_bytes(whole[:8] + b"XX" + whole[10:])
    with pytest.raises(ConfigError, match="is damaged"):
        recode(tmp_path / "kept")
