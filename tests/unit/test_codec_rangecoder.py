"""The compiled decoder reads constriction's streams exactly as constriction does."""

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from de_ray.codec.rangecoder import _BERNOULLI, Encoder, decode_bit, start
from de_ray.codec.tables import LEAST, LOGIT_LIMIT, ONE, SQUASH, STRETCH


@njit
def decode_all(words: np.ndarray, state: np.ndarray, probabilities: np.ndarray, bits: np.ndarray) -> None:
    for i in range(len(probabilities)):
        bits[i] = decode_bit(words, state, probabilities[i])


def ours(stream: bytes, probabilities: np.ndarray) -> np.ndarray:
    """int8 [n] decisions, by the compiled decoder."""
    bits = np.zeros(len(probabilities), np.int8)
    decode_all(*start(stream), probabilities, bits)
    return bits


def theirs(stream: bytes, probabilities: np.ndarray) -> np.ndarray:
    """int8 [n] decisions, by constriction."""
    words = np.frombuffer(stream + bytes(-len(stream) % 4), "<u4").astype(np.uint32)
    return constriction.stream.queue.RangeDecoder(words).decode(_BERNOULLI, probabilities / ONE).astype(np.int8)


@st.composite
def decided(draw) -> tuple[np.ndarray, np.ndarray]:
    """Decisions and probabilities, extremes and surprises among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 3000))
    shape = draw(st.sampled_from([0.05, 0.5, 1.0, 4.0]))
    probabilities = np.clip((rng.beta(shape, shape, count) * ONE).astype(np.int64), LEAST, ONE - LEAST)
    surprise = draw(st.sampled_from([0.0, 0.5, 1.0]))
    chance = np.where(rng.random(count) < surprise, 0.5, probabilities / ONE)
    return (rng.random(count) < chance).astype(np.int8), probabilities


@settings(deadline=None, max_examples=80)
@given(decided())
def test_we_and_constriction_read_the_same_decisions(sample: tuple[np.ndarray, np.ndarray]) -> None:
    bits, probabilities = sample
    encoder = Encoder()
    half = len(bits) // 2
    encoder.add(bits[:half], probabilities[:half])
    encoder.add(bits[half:], probabilities[half:])
    stream = encoder.finish()
    assert np.array_equal(ours(stream, probabilities), bits)
    assert np.array_equal(theirs(stream, probabilities), bits)


def test_every_probability_is_converted_as_constriction_does() -> None:
    probabilities = np.arange(LEAST, ONE - LEAST + 1)
    rng = np.random.default_rng(0)
    for bits in (rng.random(len(probabilities)) * ONE < probabilities, probabilities % 2 == 0):
        encoder = Encoder()
        encoder.add(bits.astype(np.int8), probabilities)
        assert np.array_equal(ours(encoder.finish(), probabilities), bits)


def test_a_stream_costs_the_information_of_its_decisions() -> None:
    rng = np.random.default_rng(1)
    probabilities = np.clip((rng.random(100_000) ** 4 * ONE).astype(np.int64), LEAST, ONE - LEAST)
    bits = (rng.random(len(probabilities)) * ONE < probabilities).astype(np.int8)
    encoder = Encoder()
    encoder.add(bits, probabilities)
    information = -np.log2(np.where(bits, probabilities, ONE - probabilities) / ONE).sum() / 8
    assert information <= len(encoder.finish()) <= 1.0001 * information + 8


def test_no_decisions_take_few_bytes() -> None:
    assert len(Encoder().finish()) <= 4


def test_noise_is_decoded_without_a_crash() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        bits = ours(rng.bytes(int(rng.integers(0, 40))), rng.integers(LEAST, ONE - LEAST, 500))
        assert set(bits) <= {-1, 0, 1}


def test_the_tables_are_inverse_and_monotone() -> None:
    assert (np.diff(SQUASH) >= 0).all() and SQUASH[0] == LEAST and SQUASH[-1] == ONE - LEAST
    assert SQUASH[LOGIT_LIMIT] == ONE // 2 and STRETCH[ONE // 2] == 0
    probabilities = np.arange(LEAST, ONE - LEAST + 1)
    there_and_back = SQUASH[STRETCH[probabilities] + LOGIT_LIMIT]
    assert (np.abs(there_and_back - probabilities) <= np.maximum(2, probabilities.clip(max=ONE // 2) // 200 + 65)).all()


@pytest.mark.parametrize("logit, probability", [(0, 32768), (256, 47911), (-256, 17625), (-1000, 1292)])
def test_squash_is_the_logistic_function(logit: int, probability: int) -> None:
    assert abs(SQUASH[logit + LOGIT_LIMIT] - probability) <= 1
