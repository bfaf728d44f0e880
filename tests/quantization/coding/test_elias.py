"""Elias's codes: his own table, a textbook writer in strings, and readers that trust nothing."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.coding.elias import GAMMA, OMEGA

fuzz = settings(max_examples=200, deadline=None)
numbers = st.lists(st.integers(0, 52).flatmap(lambda w: st.integers(2**w, 2 ** (w + 1) - 1)), max_size=30)
TOP = 2**53 - 1


def text(bits):
    return "".join(map(str, bits))


def gamma_text(v):
    return "0" * (v.bit_length() - 1) + f"{v:b}"


def omega_text(v):
    """Elias's recursion, as textbooks have it."""
    written = "0"
    while v > 1:
        written, v = f"{v:b}" + written, v.bit_length() - 1
    return written


codes = pytest.mark.parametrize("code, one", [(GAMMA, gamma_text), (OMEGA, omega_text)], ids=["gamma", "omega"])


def test_one_integer_has_the_published_code():
    published = {1: "0", 2: "100", 3: "110", 4: "101000", 7: "101110", 8: "1110000", 16: "10100100000"}
    for value, bits in {**published, 100: "1011011001000", 1000: "11100111111010000"}.items():
        assert text(OMEGA.write(np.array([value]))) == bits == omega_text(value)
    for value, bits in {1: "1", 2: "010", 3: "011", 4: "00100", 10: "0001010"}.items():
        assert text(GAMMA.write(np.array([value]))) == bits == gamma_text(value)


def test_several_integers_by_hand():
    # 5, 1, 2: gamma 00101, 1, 010 is unary 001 1 01, the second bits of 5 and 2 (0, 0), the third of 5 (1).
    assert text(GAMMA.write(np.array([5, 1, 2]))) == "001101" + "00" + "1"
    # Omega 10 101 0, 0, 10 0: first bits 1 0 1, the second of groups 10 and 10 (0, 0); first bits of what follows in
    # 5 and 2 (1, 0), the rest of the group 101 (0, then 1), and the end of 5.
    assert text(OMEGA.write(np.array([5, 1, 2]))) == "101" + "00" + "10" + "01" + "0"


@codes
@fuzz
@given(values=numbers, tail=st.lists(st.integers(0, 1), max_size=9))
def test_integers_come_back_in_as_many_bits_as_the_textbook_takes(code, one, values, tail):
    array = np.array(values, np.int64)
    bits = code.write(array)
    assert len(bits) == code.length(array) == sum(len(one(v)) for v in values)
    back, rest = code.read(np.concatenate([bits, np.array(tail, np.uint8)]), len(values), TOP)
    assert back.tolist() == values and rest.tolist() == tail


@codes
def test_small_integers_and_those_around_powers_of_two(code, one):
    powers = 2 ** np.arange(1, 53, dtype=np.int64)
    values = np.concatenate([np.arange(1, 3000), powers - 1, powers, powers + 1, [TOP]])
    back, rest = code.read(code.write(values), len(values), TOP)
    assert np.array_equal(back, values) and not len(rest)
    assert all(code.lengths[v.bit_length() - 1] == len(one(v)) for v in values.tolist())


@codes
@fuzz
@given(values=numbers.filter(bool), data=st.data())
def test_bits_cut_anywhere_are_refused(code, one, values, data):
    bits = code.write(np.array(values))
    with pytest.raises(PayloadError):
        code.read(bits[: data.draw(st.integers(0, len(bits) - 1))], len(values), TOP)


@codes
def test_an_integer_above_the_greatest_is_refused(code, one):
    for value, most in [(6, 5), (8, 7), (2**52, 100), (2, 1)]:
        with pytest.raises(PayloadError, match="integer"):
            code.read(np.concatenate([code.write(np.array([1, value])), np.zeros(99, np.uint8)]), 2, most)
        assert code.read(code.write(np.array([1, most])), 2, most)[0].tolist() == [1, most]


@pytest.mark.parametrize("code, bits", [(GAMMA, "0" * 100 + "11"), (OMEGA, "10" + "0" + "110" + "1100100" + "1")])
def test_an_integer_of_101_bits_is_refused_and_does_not_wrap_around(code, bits):
    # Two integers: gamma's widths 100 and 0; omega's groups are 10 110 1100100 and one of 101 bits, beside a 1 (0).
    with pytest.raises(PayloadError, match="more than 53 bits"):
        code.read(np.array([*map(int, bits + "0" * 200)], np.uint8), 2, TOP)


@codes
@fuzz
@given(raw=st.binary(max_size=60), count=st.integers(0, 80), most=st.integers(1, 40) | st.integers(1, TOP))
def test_any_bits_are_refused_or_have_this_one_reading(code, one, raw, count, most):
    bits = np.unpackbits(np.frombuffer(raw, np.uint8))
    try:
        values, rest = code.read(bits, count, most)
    except PayloadError:
        return
    assert len(values) == count and values.min(initial=1) >= 1 and values.max(initial=1) <= most
    assert text(code.write(values)) + text(rest) == text(bits)


@codes
def test_claims_allocate_nothing(code, one):
    tracemalloc.start()
    for bits in (np.zeros(200, np.uint8), np.ones(200, np.uint8)):
        with pytest.raises(PayloadError):
            code.read(bits, 2**31, TOP)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000  # bytes; one integer each would take gigabytes
