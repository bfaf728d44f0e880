import numpy as np
import pytest

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.coding.packing import look_up, pack, packed_size, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 3, 7, 8, 9, 16, 1000, 1003])
def test_codes_lie_one_after_the_other_and_come_back(bits, count):
    codes = np.random.default_rng(count).integers(0, 2**bits, count).astype(np.uint8)
    text = "".join(f"{code:0{bits}b}" for code in codes)
    text += "0" * (-len(text) % 8)
    data = pack(codes, bits)
    assert data == bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))
    assert len(data) == packed_size(count, bits)
    assert np.array_equal(unpack(data, count, bits), codes)
    values = np.random.default_rng(0).random(2**bits).astype(np.float32)
    assert np.array_equal(look_up(data, count, bits, values), values[codes])


@pytest.mark.parametrize("bits", range(1, 9))
def test_other_lengths_and_fillings_are_refused(bits):
    values = np.zeros(2**bits, np.float32)
    for read in (unpack, lambda data, count, bits: look_up(data, count, bits, values)):
        with pytest.raises(PayloadError, match=f"{bits + 1} bytes of codes, but 8 codes"):
            read(bytes(bits + 1), 8, bits)
        if bits < 8:  # the last bit of the last byte is filling
            with pytest.raises(PayloadError, match="padding"):
                read(bytes(bits - 1) + b"\x01", 7, bits)
