import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization import elias


def code(number):
    """Elias's own code of one number, by his words."""
    binary = bin(number)[2:]
    return "0" * (len(binary) - 1) + "1", binary[1:]


def test_a_few_numbers_by_hand():
    # 1 -> 1; 5 = 101 -> 001, 01; 2 = 10 -> 01, 0: prefixes 1 001 01, then digits 01 0.
    assert elias.encode(np.array([1, 5, 2])) == bytes([0b10010101, 0b00000000])
    assert elias.encode(np.array([], np.int64)) == b""


@given(st.lists(st.integers(1, 2**32 - 1), max_size=60))
def test_the_bits_are_eliass_and_come_back(numbers):
    data = elias.encode(np.array(numbers, np.int64))
    codes = [code(n) for n in numbers]
    bits = "".join(c[0] for c in codes) + "".join(c[1] for c in codes)
    assert "".join(f"{byte:08b}" for byte in data) == bits + "0" * (-len(bits) % 8)
    values, used = elias.decode(data + b"\xff", len(numbers)) if numbers else elias.decode(data, 0)
    assert values.tolist() == numbers and used == len(data)


@pytest.mark.parametrize(
    ("data", "count", "message"),
    [
        (b"", 1, "0 numbers where 1"),
        (b"\x00" * 5 + b"\x01", 1, "binary digits"),
        (b"\x81", 1, "filling"),
        (b"\x01", 1, "1 bytes where the numbers take 2"),
    ],
)
def test_what_encode_cannot_have_made_is_refused(data, count, message):
    with pytest.raises(PayloadError, match=message):
        elias.decode(data, count)
