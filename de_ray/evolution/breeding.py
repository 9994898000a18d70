"""Children, compiled: many of them in one call, which holds no interpreter lock.

A child is a function of its parents, the space, the rates, a seed and its own number: it makes no difference who breeds
it, nor beside which others. Loops, where expressions on arrays would be shorter, compile several times faster; so do
calls whose constants have a type, since for each bare constant the callee would be compiled anew.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from de_ray.evolution.draws import normal, stream, uniform
from de_ray.evolution.genomes import Genomes
from de_ray.evolution.operators import PART, draw, fill, swap
from de_ray.evolution.quotas import move
from de_ray.evolution.space import Field

BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
"""uint8 [256, 8], the bits of a byte, the lowest first."""


class Rates(NamedTuple):
    """How children vary; see `EvolutionConfig`."""

    quota_sigma: float
    swap: float
    regrow: float
    temperature: float


@njit(nogil=True, cache=True)
def plain(field: Field, genomes: Genomes) -> None:  # pragma: no cover - compiled
    """Write the plain top-k sets of genomes' mixes of criteria: of all free layers by one threshold."""
    keys, tiers = np.empty(field.alive.shape[1], np.float32), np.empty(field.alive.shape[1], np.uint8)
    everyone, layers = np.empty(field.alive.shape[1], np.float32), len(field.room)
    for row in range(len(genomes.mix)):
        _mix(genomes.mix[row], field.alive, np.int64(0), keys)
        tiers[:] = 0
        count = 0
        for layer in range(layers):
            begin, end = field.alive_starts[layer], field.alive_starts[layer + 1]
            genomes.quotas[row, layer], genomes.returned[row, layer] = field.fixed[layer], 0
            fill(tiers[begin:end], keys[begin:end], field.fixed[layer])
            if field.is_free[layer]:
                for i in range(begin, end):
                    everyone[count] = keys[i]
                    count += 1
        chosen = np.zeros(count, np.uint8)
        fill(chosen, everyone[:count], field.free_total)
        count = 0
        for layer in range(layers):
            if field.is_free[layer]:
                for i in range(field.alive_starts[layer], field.alive_starts[layer + 1]):
                    tiers[i] = chosen[count]
                    genomes.quotas[row, layer] += chosen[count]
                    count += 1
        _pack(tiers, genomes.members[row])


@njit(nogil=True, cache=True)
def vary(field: Field, rates: Rates, parents: Genomes, pairs: np.ndarray, shares: np.ndarray, seed: int, first: int,
         children: Genomes) -> None:  # pragma: no cover - compiled
    """Write children: parents crossed, quota moved between layers, zeroed parameters brought back, members exchanged.

    A crossed child keeps what both parents have, then takes what one of them has, then others, the least keys first.

    Args:
        field: the search space.
        rates: of the mutations.
        parents: genomes of the population.
        pairs: int64 [K, 2], rows of each child's parents; twice the same for a child of one.
        shares: float64 [K], weights of the first parents' mixes and densities, in [0, 1].
        seed: of the generation.
        first: number of the first child, >= 0; the others follow.
        children: written.
    """
    layers, size = len(field.room), field.alive.shape[1]
    keys, tiers = np.empty(size, np.float32), np.empty(size, np.uint8)
    shift, mix = np.empty(layers, np.float64), np.empty(len(field.alive), np.float32)
    for child in range(len(pairs)):
        state = stream(seed, first + child)
        one, other, share = pairs[child, 0], pairs[child, 1], shares[child]
        for criterion in range(len(mix)):
            mix[criterion] = share * parents.mix[one, criterion] + (1 - share) * parents.mix[other, criterion]
            children.mix[child, criterion] = mix[criterion]
        _mix(mix, field.alive, np.int64(0), keys)
        _count(parents.members[one], parents.members[other], tiers)
        quotas = children.quotas[child]
        for layer in range(layers):
            ours = max(field.room[layer] - parents.quotas[one, layer], 0.5)
            theirs = max(field.room[layer] - parents.quotas[other, layer], 0.5)
            shift[layer] = (1 - share) * np.log(theirs / ours)
            quotas[layer] = parents.quotas[one, layer]
        if one != other:
            move(field, shift, quotas)
            for layer in range(layers):
                begin, end = field.alive_starts[layer], field.alive_starts[layer + 1]
                fill(tiers[begin:end], keys[begin:end], quotas[layer])
            for i in range(size):
                tiers[i] *= 2
        for layer in range(layers):
            shift[layer] = rates.quota_sigma * normal(state)
        move(field, shift, quotas)
        temperature = rates.temperature * uniform(state)
        back = np.int64(0)
        for layer in range(layers):
            returned = _revive(field, rates, mix, layer, quotas[layer], state, children.revived[child], back)
            children.returned[child, layer] = returned
            back += returned
            begin, end = field.alive_starts[layer], field.alive_starts[layer + 1]
            fill(tiers[begin:end], keys[begin:end], quotas[layer] + returned)
            exchanged = round(rates.swap * uniform(state) * (quotas[layer] + returned))
            swap(tiers[begin:end], keys[begin:end], exchanged, temperature, state)
        _pack(tiers, children.members[child])


@njit(nogil=True, cache=True)
def _mix(mix, scores, start, keys):  # pragma: no cover - compiled
    """Keys float32 [n]: log saliencies [C, ...] from `start` on, mixed."""
    for first in range(0, len(keys), PART):  # a part stays in the cache until all criteria are in it
        part = keys[first:first + PART]
        for i in range(len(part)):
            part[i] = 0
        for criterion in range(len(mix)):
            weight, of = mix[criterion], scores[criterion, start + first:start + first + len(part)]
            for i in range(len(part)):
                part[i] += weight * of[i]


@njit(nogil=True, cache=True)
def _count(one, other, tiers):  # pragma: no cover - compiled
    """Tiers uint8 [N]: in how many of two sets of bits each position is."""
    whole = len(tiers) // 8
    for byte in range(whole):
        mine, others = BITS[one[byte]], BITS[other[byte]]
        for bit in range(8):
            tiers[8 * byte + bit] = mine[bit] + others[bit]
    for i in range(8 * whole, len(tiers)):
        tiers[i] = BITS[one[whole], i - 8 * whole] + BITS[other[whole], i - 8 * whole]


@njit(nogil=True, cache=True)
def _revive(field, rates, mix, layer, quota, state, places, begun):  # pragma: no cover - compiled
    """Write the zeroed parameters that a mutation brings back to a layer, the most salient first; their number."""
    begin, end = field.dead_starts[layer], field.dead_starts[layer + 1]
    count = round(rates.regrow * uniform(state) * (field.room[layer] - quota))
    count = min(count, end - begin, field.alive_starts[layer + 1] - field.alive_starts[layer] - quota)
    if count > 0:
        keys = np.empty(end - begin, np.float32)
        _mix(mix, field.dead, begin, keys)
        for i in range(len(keys)):
            keys[i] = -keys[i]
        found = draw(keys, count, rates.temperature, state)
        for i in range(count):
            places[begun + i] = begin + found[i]
    return count


@njit(nogil=True, cache=True)
def _pack(inside, bits):  # pragma: no cover - compiled
    """Write members, uint8 [N] of 0 and 1, as bits; see `Genomes.members`."""
    whole = len(inside) // 8
    for byte in range(whole):
        packed = np.uint8(0)
        for bit in range(8):
            packed |= inside[8 * byte + bit] << bit
        bits[byte] = packed
    if whole < len(bits):
        bits[whole] = 0
        for i in range(8 * whole, len(inside)):
            bits[whole] |= inside[i] << (i - 8 * whole)
