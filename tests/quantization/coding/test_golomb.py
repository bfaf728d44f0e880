"""Golomb-Rice codes of positions: the paper's lengths, a bitwise slow reader, and a decoder that trusts nothing."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.coding.golomb import decode, encode, rice_bits

fuzz = settings(max_examples=300, deadline=None)
masks = st.lists(st.booleans(), min_size=1, max_size=200).filter(any)


def paper_bits(p, bits):
    """Sattler et al.'s mean length of a position with remainders of `bits` bits."""
    return bits + 1 / (1 - (1 - p) ** 2**bits)


def slow_decode(data, chosen, count):
    """The format read bit by bit, without numpy."""
    flat = iter("".join(f"{byte:08b}" for byte in data))
    bits = rice_bits(chosen, count)
    remainders = [sum(int(next(flat)) << (bits - 1 - i) for i in range(bits)) for _ in range(chosen)]
    positions, at = [], -1
    for remainder in remainders:
        quotient = 0
        while next(flat) == "0":
            quotient += 1
        at += quotient * 2**bits + remainder + 1
        positions.append(at)
    filling = [*flat]
    assert "1" not in filling and len(filling) < 8
    return positions


def test_the_parameter_is_the_papers():
    # ln(phi - 1) = -.48121. p = .1: ln(1 - p) = -.10536, ratio 4.57, 1 + floor(2.19) = 3.
    # p = .01: -.010050, ratio 47.9, 1 + floor(5.58) = 6. p = .5: -.693, ratio .694, 1 + floor(-.53) = 0.
    assert [rice_bits(*share) for share in [(10, 100), (1, 100), (50, 100)]] == [3, 6, 0]
    # p = .9: -2.303, ratio .209, 1 + floor(-2.26) = -2, where 0 serves; p = 1 has no logarithm.
    assert [rice_bits(*share) for share in [(90, 100), (100, 100), (1, 1)]] == [0, 0, 0]
    assert rice_bits(1, 2**32 - 1) == 31  # ratio .48121 * 2**32, 1 + floor(30.9)


@pytest.mark.parametrize("chosen", [*range(1, 100, 3), 100, 300, 600, 900, 999])
def test_no_other_parameter_is_shorter_on_average(chosen):
    p = chosen / 1000
    lengths = [paper_bits(p, bits) for bits in range(16)]
    assert min(lengths) == lengths[rice_bits(chosen, 1000)]


def test_three_positions_by_hand():
    # 3 of 30: p = .1, 3 bits. Positions 2, 12, 29 are gaps 2, 9, 16: remainders 010 001 000, quotients 0, 1, 2 as
    # 1 01 001: 01000100 0101001 and a zero to fill up.
    positions = np.array([2, 12, 29])
    assert encode(positions, 30) == bytes([0b01000100, 0b01010010])
    assert decode(bytes([0b01000100, 0b01010010]), 3, 30).tolist() == [2, 12, 29]


@fuzz
@given(masks)
def test_positions_come_back_and_a_slow_reader_agrees(mask):
    positions = np.flatnonzero(mask)
    data = encode(positions, len(mask))
    assert decode(data, len(positions), len(mask)).tolist() == positions.tolist()
    assert slow_decode(data, len(positions), len(mask)) == positions.tolist()


@pytest.mark.parametrize("p", [0.001, 0.01, 0.03, 0.1, 0.25, 0.5, 0.8])
def test_random_masks_take_the_papers_bits(p):
    n = 1_000_000
    positions = np.flatnonzero(np.random.default_rng(7).random(n) < p)
    measured = 8 * len(encode(positions, n)) / len(positions)
    bits = rice_bits(round(p * n), n)
    # A length varies as its quotient does, with standard deviation sqrt(r) / (1 - r) for r = (1 - p)^(2^bits); six
    # standard errors, and the filling, 7 bits at most. At p = .01 another b* would be off by .27, this allows .10.
    r = (1 - p) ** 2**bits
    assert abs(measured - paper_bits(p, bits)) <= 6 * r**0.5 / (1 - r) / len(positions) ** 0.5 + 7 / len(positions)


def test_none_and_all_and_the_last_of_very_many():
    assert encode(np.zeros(0, np.int64), 9) == b"" and len(decode(b"", 0, 9)) == 0
    assert encode(np.arange(9), 9) == b"\xff\x80" and decode(b"\xff\x80", 9, 9).tolist() == [*range(9)]
    last = np.array([2**32 - 2])
    assert decode(encode(last, 2**32 - 1), 1, 2**32 - 1).tolist() == last.tolist()


@pytest.mark.parametrize(
    "data, chosen, count",
    [
        (b"\x00", 0, 9),  # bytes for nothing
        (b"\xff\x80", 10, 9),  # more than there are
        (b"", 1, 9),
        (bytes([0b01000100, 0b01010011]), 3, 30),  # the filling is not zero
        (bytes([0b01000100, 0b01010010, 0]), 3, 30),  # a byte too many
        (bytes([0b01000100]), 3, 30),  # cut
        (bytes([0b01000100, 0b01000000]), 3, 30),  # a quotient without its end
        (bytes([0b01000100, 0b11010010]), 3, 30),  # a quotient too many
        (bytes([0b01000100, 0b10101001]), 3, 30),  # three quotients and a one in the last bit
        (bytes([0b01000100, 0b11010010]), 3, 29),
    ],
)
def test_what_encode_cannot_have_made_is_refused(data, chosen, count):
    with pytest.raises(PayloadError):
        decode(data, chosen, count)


def test_an_empty_byte_more_is_refused_where_other_positions_take_it():
    # 20 of 1000: 5 bits each and 20 quotients of 0 are 120 bits; the last 20 would take 30 bits more.
    first, last = encode(np.arange(20), 1000), encode(np.arange(980, 1000), 1000)
    assert (len(first), len(last)) == (15, 19)
    with pytest.raises(PayloadError, match="quotients"):
        decode(first + b"\0", 20, 1000)


def test_a_position_beyond_the_elements_is_refused():
    # As by hand above, with a last gap of 17: position 30 of 30.
    with pytest.raises(PayloadError, match="position of 30"):
        decode(bytes([0b01000100, 0b11010010]), 3, 30)


@fuzz
@given(st.binary(max_size=40), st.integers(-1, 60), st.integers(1, 60))
def test_rubbish_is_refused_or_has_this_one_reading(data, chosen, count):
    try:
        positions = decode(data, chosen, count)
    except PayloadError:
        return
    assert len(positions) == chosen and encode(positions, count) == data


def test_claims_and_needless_bytes_allocate_nothing():
    long = bytes(1_000_000)
    tracemalloc.start()
    for chosen in (1, 2**20, 2**31, 2**32 - 1):
        with pytest.raises(PayloadError):
            decode(bytes(30), chosen, 2**32 - 1)
    with pytest.raises(PayloadError, match="take 7 to 8 bits"):
        decode(long, 1, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000  # bytes; one position each would take gigabytes
