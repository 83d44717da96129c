"""Masks: the standard's vector, and independence of how a vector is cut."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from murmur.privacy.masks import AUX, CHUNK, RING, Keystream, Masks


def naive(key: bytes, count: int, dtype: np.dtype) -> np.ndarray:
    """The whole mask at once, as the definition says it."""
    zeros = bytes(count * dtype.itemsize)
    return np.frombuffer(Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(zeros), dtype)


def test_the_keystream_is_aes_256_ctr_of_sp_800_38a():
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = int("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", 16)
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    for start in range(len(plain)):
        stream = bytearray(len(plain) - start)
        Keystream(key, counter=counter, start=start).into(memoryview(stream))
        assert bytes(a ^ b for a, b in zip(plain[start:], stream, strict=True)) == cipher[start:]


@pytest.mark.parametrize("dtype", [RING, AUX])
@pytest.mark.parametrize("count", [0, 1, 65535, 65536, 65537, 2 * CHUNK + 3])
def test_masks_are_added_and_taken_away_exactly(dtype, count):
    keys = [bytes([i]) * 32 for i in range(3)]
    values = np.random.default_rng(1).integers(0, 1 << 63, count, np.uint64).astype(dtype)
    masked = values.copy()
    Masks([(keys[0], True), (keys[1], False), (keys[2], True)], dtype).apply(masked)
    expected = values + naive(keys[0], count, dtype) - naive(keys[1], count, dtype) + naive(keys[2], count, dtype)
    assert np.array_equal(masked, expected)
    Masks([(keys[0], False), (keys[1], True), (keys[2], False)], dtype).apply(masked)
    assert np.array_equal(masked, values)


def test_cutting_a_vector_anywhere_changes_nothing():
    keys = [(b"k" * 32, True), (b"l" * 32, False)]
    whole = np.zeros(CHUNK + 100, RING)
    Masks(keys, RING).apply(whole)
    cut = np.zeros_like(whole)
    masks = Masks(keys, RING)
    for a, b in ((0, 1), (1, 1), (1, 8), (8, 65537), (65537, len(cut))):
        masks.apply(cut[a:b])
    assert np.array_equal(cut, whole)
    for start in (0, 1, 3, 4, 5, 65535, 65536, 65537):
        tail = np.zeros(len(whole) - start, RING)
        Masks(keys, RING, start=start).apply(tail)
        assert np.array_equal(tail, whole[start:])


def test_masks_of_another_width_are_an_error():
    with pytest.raises(ValueError, match="uint32"):
        Masks([], RING).apply(np.zeros(3, np.int64))
