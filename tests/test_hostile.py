"""Whatever a file holds, reading it gives a value or a FedLQError. FEDLQ_FUZZ=100000 runs the long fuzz."""

import contextlib
import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedlq_ray.config.load import load, to_yaml
from fedlq_ray.data.datasets import load as load_data
from fedlq_ray.errors import CheckpointError, ConfigError
from fedlq_ray.federation.profiles import load_profiles
from fedlq_ray.federation.state import FIELDS
from fedlq_ray.runs import rundir
from fedlq_ray.runs.checkpoint import VERSION, pack, unpack
from fedlq_ray.runs.storage import Folder, latest
from fedlq_ray.sweeps.sweep import load as load_sweep

fuzz = settings(max_examples=int(os.environ.get("FEDLQ_FUZZ", "150")), deadline=None)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8)
tensors = st.binary(max_size=12).map(
    lambda b: torch.frombuffer(bytearray(b + b"\0" * (-len(b) % 4 + 4)), dtype=torch.int32)
)


def trees(leaves: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.integers(0, 99) | st.text(max_size=5), inner, max_size=4)
        ),
        max_leaves=12,
    )


damage = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)


def damaged(data: bytes, hits: list[tuple[int, int]], cut: int) -> bytes:
    spoiled = bytearray(data)
    for at, value in hits:
        spoiled[at % len(spoiled)] = value
    return bytes(spoiled[: cut % (len(spoiled) + 1)] if cut % 3 == 0 else spoiled)


def read_or_refused(suffix: str, data: bytes, read: Callable[[str], object]) -> None:
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(ConfigError):
            read(file.name)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))  # type: ignore[arg-type]
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)  # type: ignore[call-overload,index]
    return type(a) is type(b) and a == b


@given(st.dictionaries(st.text(min_size=1, max_size=5), trees(scalars | tensors), max_size=4))
@fuzz
def test_a_checkpoint_comes_back_as_it_was(tree: dict[str, object]) -> None:
    assert same(tree, unpack(pack(tree)))


WHOLE = pack({"round": 3, "weights": torch.arange(6.0), "held": {1: (2, [None, 0.5])}})


@given(damage, st.integers(0, 10**6))
@fuzz
def test_a_damaged_checkpoint_is_refused(hits: list[tuple[int, int]], cut: int) -> None:
    spoiled = damaged(WHOLE, hits, cut)
    if spoiled != WHOLE:
        with pytest.raises(CheckpointError):
            unpack(spoiled)


@given(damage, st.integers(0, 10**6))
@fuzz
def test_a_checkpoint_whose_checksum_was_made_to_fit(hits: list[tuple[int, int]], cut: int) -> None:
    """What lies behind the checksum must hold on its own."""
    body = damaged(WHOLE[40:], hits, cut)
    with contextlib.suppress(CheckpointError):
        assert isinstance(unpack(WHOLE[:8] + hashlib.sha256(body).digest() + body), dict)


def with_tree(tree: bytes) -> bytes:
    """A checkpoint with a checksum that fits around anything."""
    body = safetensors.numpy.save({"tree": np.frombuffer(tree, np.uint8), "0": np.zeros(2)})
    return WHOLE[:8] + hashlib.sha256(body).digest() + body


json_trees = st.recursive(
    scalars.filter(lambda value: value not in (float("inf"), -float("inf"))) | st.just("0"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["tuple", "dict", "float", "tensor", "scalar", "array", "x"]), inner, max_size=2
        )
    ),
    max_leaves=8,
)


@given(json_trees | st.fixed_dictionaries({"round": json_trees}))
@example([1])
@example(1)
@example({"x": {"float": 10**400}})
@fuzz
def test_a_checkpoint_of_any_tree(tree: object) -> None:
    with contextlib.suppress(CheckpointError):
        assert isinstance(unpack(with_tree(json.dumps(tree).encode())), dict)


def test_a_checkpoint_that_is_nested_too_deeply() -> None:
    for tree in (b"[" * 100_000, b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            unpack(with_tree(tree))


@pytest.mark.parametrize("snapshot", [{"round": "x"}, {"round": None}, {"round": -1}, {"round": True}, {}])
def test_a_checkpoint_of_no_round(snapshot: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "00000001.ckpt").write_bytes(pack(snapshot))
    with pytest.raises(CheckpointError, match=r"00000001\.ckpt does not state its round"):
        latest(Folder(str(tmp_path)), 3)


def test_a_checkpoint_without_what_a_run_goes_on_from(tmp_path: Path) -> None:
    snapshot = dict.fromkeys(FIELDS) | {"round": 1}
    (tmp_path / "00000001.ckpt").write_bytes(pack(snapshot))
    assert latest(Folder(str(tmp_path)), 3) == (snapshot, [])
    del snapshot["weights"], snapshot["memories"]
    (tmp_path / "00000001.ckpt").write_bytes(pack(snapshot))
    with pytest.raises(CheckpointError, match=r"00000001\.ckpt lacks weights, memories"):
        latest(Folder(str(tmp_path)), 3)


def test_a_checkpoint_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "00000001.ckpt").write_bytes(WHOLE[:6] + (VERSION + 1).to_bytes(2, "little") + WHOLE[8:])
    with pytest.raises(CheckpointError, match=f"is of format {VERSION + 1}, and this program reads {VERSION}"):
        latest(Folder(str(tmp_path)), 3)


@given(damage, st.integers(0, 10**6))
@fuzz
def test_configuration_files(hits: list[tuple[int, int]], cut: int) -> None:
    read_or_refused(".yaml", damaged(to_yaml(load(None, [])).encode(), hits, cut), load)


@given(
    st.sampled_from(["rounds", "clients", "train.lr", "strategy.args", "data.classes", "strategy.levels", "x"]),
    trees(scalars),
)
@fuzz
def test_configuration_values(name: str, value: object) -> None:
    with contextlib.suppress(ConfigError):
        load(None, [f"{name}={value}"])
    read_or_refused(".yaml", yaml.safe_dump({name: value}).encode(), load)


@pytest.mark.parametrize(
    "value",
    ["!!int x", "!!int ''", "!!float x", "!!bool x", "!!timestamp x", "9" * 5000, "0x" + "f" * 5000, "[" * 3000,
     "[" * 3000 + "]" * 3000, "{a: " * 300 + "}" * 300],
    ids=lambda value: value[:12],
)  # fmt: skip
def test_values_that_yaml_cannot_make(value: str, tmp_path: Path) -> None:
    for name in ("rounds", "name", "strategy.args.x"):
        with pytest.raises(ConfigError, match=rf"^({name}[=:]|the command line: )") as caught:
            load(None, [f"{name}={value}"])
        assert len(str(caught.value)) < 700
    for reader, text in ((load, f"strategy: {{args: {{x: {value}}}}}"), (load_sweep, f"runs: {{a: [{value}]}}")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"c\.yaml"):
            reader(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("runs: {a: []}")
    with pytest.raises(ConfigError, match=r"c\.yaml, run a"):
        load_sweep(tmp_path / "c.yaml", [f"rounds={value}"])


def _npz() -> bytes:
    out = io.BytesIO()
    rng = np.random.default_rng(0)
    x, y = rng.random((40, 2, 2)).astype(np.float32), np.arange(40) % 4
    np.savez(out, x_train=x, y_train=y, x_test=x, y_test=y)
    return out.getvalue()


NPZ = _npz()


@given(damage, st.integers(0, 10**6))
@fuzz
def test_npz_files(hits: list[tuple[int, int]], cut: int) -> None:
    read_or_refused(".npz", damaged(NPZ, hits, cut), lambda file: load_data("npz", file))


def test_an_npz_with_a_pickle_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    trap = np.array([Trap()], dtype=object)
    np.savez(tmp_path / "trap.npz", x_train=trap, y_train=trap, x_test=trap, y_test=trap, allow_pickle=True)
    with pytest.raises(ConfigError, match="plain arrays"):
        load_data("npz", str(tmp_path / "trap.npz"))
    assert not (tmp_path / "sprung").exists()


def test_an_npz_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    """A header of a few bytes must not allocate gigabytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)})
    with zipfile.ZipFile(tmp_path / "big.npz", "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", header.getvalue())
    with pytest.raises(ConfigError, match=r"big\.npz"):
        load_data("npz", str(tmp_path / "big.npz"))


CSV = b"uplink_mbps,downlink_mbps,compute_gflops,latency_ms\n1,5,10,50\n0.5,2,3,20\n"


@given(damage, st.integers(0, 10**6))
@fuzz
def test_profile_files(hits: list[tuple[int, int]], cut: int) -> None:
    spoiled = damaged(CSV, hits, cut)
    read_or_refused(".csv", spoiled, lambda file: load_profiles(file, count=2, seed=0, variation=0.25))


@given(st.lists(st.binary(max_size=30) | st.just(b'{"round": 0}') | st.just(b'{"round": 1}'), max_size=5))
@fuzz
def test_journals(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rounds.jsonl").write_bytes(b"\n".join(lines))
        assert [record.round for record in rundir.journal(Path(folder))] == list(
            range(len(rundir.journal(Path(folder))))
        )
