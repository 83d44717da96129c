"""Degree and threshold of large rounds: the tails against whole numbers, the bounds against a ring that is attacked."""

import itertools
import math
import random
from fractions import Fraction

import pytest

from murmur.protocol.recipe import parse_recipe
from murmur.protocol.sections import Secure
from murmur.protocol.thresholds import (
    CORRECTNESS,
    PRIVACY,
    MaskGraph,
    default_threshold,
    exposure,
    failure,
    fewest,
    holders,
    mask_graph,
    tail,
)


def exact_tail(n, marked, drawn, least):
    ways = sum(
        math.comb(marked, x) * math.comb(n - marked, drawn - x) for x in range(max(least, 0), min(marked, drawn) + 1)
    )
    return Fraction(ways, math.comb(n, drawn))


def test_tails_are_those_of_whole_numbers():
    seed = 3
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(300):
        n = rng.randint(1, 400)
        case = n, rng.randint(0, n), rng.randint(0, n), rng.randint(-1, n // 3)
        expected = float(exact_tail(*case))
        assert math.isclose(tail(*case), expected, rel_tol=1e-9, abs_tol=1e-13), case


def test_a_small_tail_of_a_large_cohort_keeps_its_digits():
    """Where quantile functions fail: 10^6 clients, 10^5 of them corrupt, 46 or more of 90 neighbours."""
    assert math.isclose(tail(10**6, 10**5, 90, 46), float(exact_tail(10**6, 10**5, 90, 46)), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (50, ((8, 6), (16, 11), (22, 17))),
        (100, ((16, 11), (32, 22), (42, 32))),
        (200, ((30, 21), (56, 39), (76, 57))),
        (500, ((44, 31), (82, 57), (116, 86))),
        (1000, ((52, 37), (96, 67), (140, 104))),
        (5000, ((58, 41), (116, 81), (172, 127))),
        (10**6, ((74, 52), (146, 101), (222, 163))),
    ],
)
def test_the_tails_give_a_table_that_was_found_without_them(n, expected):
    """A search of an independent prototype, for (corrupt, dropout) of 5 % / 5 %, 10 % / 10 % and 20 % / 10 %.

    Its bounds differ from ours, as its (k, t) do: only neighbours hold shares (2t > k + c), no roster shrinks, and
    a coordinator that lies about who dropped out does not try to cut the ring, for which half of 2^-40 is kept anyway.
    """
    found = []
    for corrupt, dropout in ((0.05, 0.05), (0.1, 0.1), (0.2, 0.1)):
        c, d = int(corrupt * n + 1e-9), int(dropout * n + 1e-9)
        pairs = ((k, t) for k in itertools.count(2, 2) for t in range(k // 2 + 1, k + 1))
        found.append(
            next(
                (k, t)
                for k, t in pairs
                if n * tail(n - 1, d, k, k + 1 - t) <= CORRECTNESS and n * tail(n - 1, c, k, 2 * t - k) <= PRIVACY / 2
            )
        )
    assert tuple(found) == expected


TABLE = {
    # n: (k, t) for corrupt / dropout of 5 % / 5 %, 10 % / 10 %, 20 % / 10 %; the table of docs/decisions/0008
    51: ((14, 12), (26, 21), (36, 31)),
    100: ((22, 18), (42, 33), (56, 47)),
    200: ((40, 31), (68, 51), (94, 75)),
    500: ((52, 39), (102, 75), (150, 117)),
    1000: ((60, 45), (120, 88), (186, 144)),
    5000: ((70, 52), (146, 106), (238, 183)),
    10_000: ((74, 55), (154, 112), (250, 192)),
}


@pytest.mark.parametrize("n", TABLE)
def test_the_table_of_degrees_and_thresholds(n):
    assert tuple(mask_graph(n, *x) for x in ((0.05, 0.05), (0.1, 0.1), (0.2, 0.1))) == TABLE[n]


def test_no_smaller_degree_and_no_smaller_threshold_would_do():
    for n, corrupt, dropout in ((80, 0.1, 0.1), (300, 0.05, 0.1), (1000, 0.1, 0.05)):
        k, t = mask_graph(n, corrupt, dropout)
        assert exposure(n, k, t, corrupt) <= PRIVACY < exposure(n, k, t - 1, corrupt)
        assert failure(n, k, t, dropout) <= CORRECTNESS
        for fewer, s in itertools.product(range(2, k, 2), range(1, k + 2)):
            if s <= fewer + 1 < 2 * s:
                assert exposure(n, fewer, s, corrupt) > PRIVACY or failure(n, fewer, s, dropout) > CORRECTNESS


def test_up_to_fifty_clients_everybody_masks_with_everybody():
    assert mask_graph(50, 0.1, 0.1) == MaskGraph(0, 34)
    assert mask_graph(51, 0.1, 0.1).degree == 26
    assert mask_graph(60, 0.4, 0.4) == MaskGraph(0, default_threshold(60))  # no degree is safe: 0.4 + 2 * 0.4 > 1


def test_holders_and_the_fewest_clients():
    assert (holders(8, 4), holders(8, 0), holders(4, 6)) == (5, 8, 4)
    assert fewest(10, 0, 7, 3) == 7
    assert fewest(10, 0, 7, 9) == 9
    assert fewest(100, 42, 33, 3) == 77  # 100 * 33 / 43 = 76.7


# The bounds, against attacks that are played


def test_the_bound_on_failure_is_not_below_what_happens():
    """12 % of 40 clients drop out of a ring of degree 10: how often has somebody fewer than t holders left?"""
    n, k, t, d, seed = 40, 10, 8, 5, 7
    print("seed", seed)
    rng, failed = random.Random(seed), 0
    for _ in range(4000):
        gone = set(rng.sample(range(n), d))
        failed += any(sum((i + j) % n not in gone for j in range(-k // 2, k // 2 + 1)) < t for i in range(n))
    bound = failure(n, k, t, d / n)
    assert failed / 4000 <= bound + 3 * (bound / 4000) ** 0.5
    assert failed / 4000 > bound / 8  # a union bound over neighbourhoods that overlap


def shown(n, k, t, corrupt, lists):
    """What comes out when each honest client i is told that the updates of lists[i] are summed, itself in it.

    A slow model of the protocol, in which the corrupt sign and show everything. Returns the honest clients both of
    whose secrets come out, and the groups of honest clients whose sum can be read: all their self masks are known, and
    no mask that stays joins them to anybody else.
    """
    hold = {i: [(i + j) % n for j in range(-(k // 2), k // 2 + 1)] for i in range(n)}
    honest = [i for i in range(n) if i not in corrupt]

    def signs(j, i):
        return j in lists[i] and (j in corrupt or lists[j] == lists[i])

    reveals = {i for i in honest if sum(signs(j, i) for j in hold[i]) >= t}
    of_self = {i for i in honest if sum(j in corrupt or (j in reveals and i in lists[j]) for j in hold[i]) >= t}
    of_seed = {i for i in honest if sum(j in corrupt or (j in reveals and i not in lists[j]) for j in hold[i]) >= t}
    left, groups = set(honest) - of_seed, []
    while left:
        group, todo = set(), [min(left)]
        while todo:
            i = todo.pop()
            if i not in group:
                group.add(i)
                todo += [j for j in hold[i] if j in left]
        left -= group
        if group <= of_self:
            groups.append(group)
    return of_self & of_seed, groups


def rows_apart(n, h, corrupt, least):
    """Whether two separate rows of h clients on the ring hold at least so many corrupt ones each."""
    rows = [i for i in range(n) if sum((i + j) % n in corrupt for j in range(h)) >= least]
    return any(h <= (j - i) % n <= n - h for i in rows for j in rows)


def test_a_ring_is_cut_only_where_two_rows_hold_enough_corrupt_clients():
    """Every placing of up to three corrupt and three dropped clients on a ring of ten: what `exposure` bounds covers
    all in which a coordinator that keeps to one list reads the honest in two parts."""
    n, k, cut = 10, 4, 0
    for t, c, d in itertools.product((3, 4), range(4), range(4)):
        for bad in itertools.combinations(range(n), c):
            for gone in itertools.combinations([i for i in range(n) if i not in bad], d):
                # One that dropped out neither signs nor shows: its own list says nothing.
                alive = frozenset(range(n)) - set(gone)
                lists = {i: alive if i in alive else frozenset([i]) for i in range(n)}
                if len(shown(n, k, t, set(bad), lists)[1]) > 1:
                    cut += 1
                    assert rows_apart(n, 2, set(bad), t - 3), (t, bad, gone)
    assert cut > 0


def test_a_coordinator_that_shows_several_lists_gains_no_more():
    """Two lists, told to two arcs of a ring or at random: both secrets of a client, or the honest in two parts, come
    out only where the corrupt stand as `exposure` counts."""
    seed = 11
    print("seed", seed)
    rng, exposed, cut = random.Random(seed), 0, 0
    for _ in range(20_000):
        n, h, c = rng.randint(9, 14), rng.randint(1, 3), rng.randint(0, 6)
        k, bad = 2 * h, frozenset(rng.sample(range(n), c))
        t = rng.randint(h + 1, k + 1)
        first, length = rng.randrange(n), rng.randint(1, n - 1)
        told = {i: (i - first) % n < length if rng.random() < 0.95 else rng.random() < 0.5 for i in range(n)}
        both = [frozenset(i for i in range(n) if i in bad or told[i] == side or rng.random() < 0.5) for side in (0, 1)]
        out, groups = shown(n, k, t, bad, {i: both[told[i]] for i in range(n)})
        if out:
            exposed += 1
            near = {v: sum((v + j) % n in bad for j in range(-h, h + 1)) for v in out}
            assert max(near.values()) >= 2 * t - k - 1, (n, k, t, bad)
        elif len(groups) > 1:
            cut += 1
            near = [sum((v + j) % n in bad for j in range(-h, h + 1)) for v in range(n) if v not in bad]
            assert max(near) >= 2 * t - k - 1 or rows_apart(n, h, bad, t - h - 1), (n, k, t, bad)
    assert exposed > 100
    assert cut > 100


# The recipe's settings


def test_what_a_recipe_sets_wins():
    assert Secure().graph(20) == (0, 14)
    assert Secure().graph(100) == (42, 33)
    assert Secure(corrupt=0.05, dropout=0.05).graph(100) == (22, 18)
    assert Secure(threshold=70).graph(100) == (0, 70)  # as in release 0.1.0: the complete graph
    assert Secure(degree=20).graph(100) == (20, 15)  # 2 * 21 // 3 + 1
    assert Secure(degree=20, threshold=16).graph(100) == (20, 16)
    assert Secure(degree=20).graph(21) == (0, 15)


def test_clients_that_a_round_is_closed_without_count_as_dropped():
    base = {"name": "t", "task": "t", "cohort": {"size": 100, "over_select": 1.2}}
    recipe = parse_recipe(base)
    assert recipe.cohort.asked == 120
    assert recipe.mask_graph(120) == mask_graph(120, 0.1, 1 - 100 / 120) != mask_graph(120, 0.1, 0.1)
    with pytest.raises(Exception, match=r"of 200 clients asked, 134 are needed to unmask"):
        parse_recipe(base | {"cohort": {"size": 100, "over_select": 2.0}})


def test_an_odd_degree_is_refused():
    with pytest.raises(Exception, match="multiple of 2"):
        parse_recipe({"name": "t", "task": "t", "secure": {"degree": 7}})
