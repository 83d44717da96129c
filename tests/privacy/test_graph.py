"""The graph of masks: regular, symmetric, connected, and nobody's choice."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from murmur.privacy.graph import neighbours, short, standing

IDS = [f"c{i:03}" for i in range(60)]


def reached(near, start, gone=frozenset()):
    found, todo = {start}, [start]
    while todo:
        for v in near[todo.pop()] - found - gone:
            found.add(v)
            todo.append(v)
    return found


@settings(deadline=None)
@given(n=st.integers(3, 60), half=st.integers(1, 12), session=st.binary(min_size=32, max_size=32))
def test_the_graph_is_regular_symmetric_and_connected(n, half, session):
    clients, k = IDS[:n], min(2 * half, n - 1)
    near = neighbours(session, clients, 2 * half)
    assert near.keys() == set(clients)
    for u in clients:
        assert len(near[u]) == k
        assert u not in near[u]
        assert all(u in near[v] for v in near[u])
    assert reached(near, clients[0]) == set(clients)


def test_a_ring_of_eight_by_hand():
    """Degree 4 joins those at distance 1 and 2, so that exactly three in ring order have no neighbour beyond them."""
    near = neighbours(b"s", IDS[:8], 4)
    ring = [IDS[0]]
    while len(ring) < 8:  # the two that share the most neighbours with the last one stand next to it: 2 of its 4
        common = {v: len(near[v] & near[ring[-1]]) for v in near[ring[-1]]}
        ring.append(next(v for v, c in sorted(common.items()) if c == 2 and v not in ring))
    assert near == {u: frozenset(ring[(i + j) % 8] for j in (-2, -1, 1, 2)) for i, u in enumerate(ring)}


def test_only_two_runs_of_half_the_degree_cut_the_ring():
    """Any k - 1 clients may vanish, wherever they stand; of the sets of k clients that cut it each is two runs."""
    near = neighbours(b"s", IDS[:9], 4)
    everyone = set(IDS[:9])
    for gone in itertools.combinations(IDS[:9], 3):
        rest = everyone - set(gone)
        assert reached(near, min(rest), frozenset(gone)) == rest
    cuts = 0
    for gone in itertools.combinations(IDS[:9], 4):
        rest = everyone - set(gone)
        cuts += reached(near, min(rest), frozenset(gone)) != rest
    # 9 places for the first run, the second 1 to 4 places on behind it, each pair counted from both its runs
    assert cuts == 9 * 4 // 2


@pytest.mark.parametrize("degree", [0, 6, 8, 100])
def test_a_degree_that_everybody_fills_is_the_complete_graph(degree):
    assert neighbours(b"s", IDS[:7], degree) == {u: frozenset(IDS[:7]) - {u} for u in IDS[:7]}


def test_the_graph_depends_on_the_session_and_on_who_takes_part_and_not_on_their_order():
    one = neighbours(b"session 1", IDS, 6)
    assert one == neighbours(b"session 1", IDS[::-1], 6)
    for other in (neighbours(b"session 2", IDS, 6), neighbours(b"session 1", IDS[:-1], 6)):
        assert sum(one[u] != other[u] for u in IDS[:-1]) > 5
    # over many sessions every pair is joined as often as any other: 6 of 59 times
    count = sum(IDS[1] in neighbours(bytes([i, j]), IDS, 6)[IDS[0]] for i in range(100) for j in range(20))
    assert abs(count - 2000 * 6 / 59) < 5 * (2000 * 6 / 59 * 53 / 59) ** 0.5


def test_which_secrets_must_be_rebuilt_and_which_no_longer_can():
    near = {
        "a": frozenset("be"),
        "b": frozenset("ac"),
        "c": frozenset("bd"),
        "d": frozenset("ce"),
        "e": frozenset("da"),
    }
    assert standing(near, "abcde", "ab") == ["a", "b", "c", "e"]  # d masked with c and e alone, who are not summed
    assert standing(near, "abe", "ab") == ["a", "b", "e"]
    # a's shares lie with a, b, e
    assert short(near, "abcde", "abc", 2) == ["d", "e"]
    assert short(near, "abcde", "abc", 3) == ["a", "c", "d", "e"]
    assert short(near, "abcde", "abcde", 3) == []
