"""The allocation against brute force, at its edges, and at scale."""

import itertools
from math import inf, isclose, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.errors import PwoptError
from pwopt.search import allocation
from pwopt.search.allocation import Choice, allocate

Groups = list[list[Choice[tuple[int, int]]]]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Groups, list[int]]:
    """Costs and harms are small whole numbers, so that ties and exact fits are frequent."""
    bounds = draw(st.integers(1, 3))
    whole = st.integers(0, 12)
    groups = draw(
        st.lists(
            st.lists(st.tuples(st.tuples(*[whole] * bounds), whole), min_size=1, max_size=4),
            min_size=1,
            max_size=4,
        )
    )
    budget = draw(st.lists(st.integers(0, 36), min_size=bounds, max_size=bounds))
    return [
        [Choice((i, j), cost, harm) for j, (cost, harm) in enumerate(group)]
        for i, group in enumerate(groups)
    ], budget


def least_harm(groups: Groups, budget: list[int]) -> float | None:
    """Try all combinations."""
    return min(
        (
            sum(choice.harm for choice in chosen)
            for chosen in itertools.product(*groups)
            if all(sum(choice.cost[k] for choice in chosen) <= b for k, b in enumerate(budget))
        ),
        default=None,
    )


def scaled(groups: Groups, cost: float, harm: float) -> Groups:
    return [
        [Choice(c.key, tuple(cost * x for x in c.cost), harm * c.harm) for c in group]
        for group in groups
    ]


@given(problems(), st.sampled_from([1e-3, 1, 1e9]), st.sampled_from([1e-6, 1, 1e9]))
@settings(deadline=None)
def test_least_harm_within_the_budget_at_any_scale(
    problem: tuple[Groups, list[int]], cost: float, harm: float
) -> None:
    groups, budget = problem
    taken = allocate(scaled(groups, cost, harm), [cost * limit for limit in budget])
    best = least_harm(groups, budget)
    if best is None:
        assert taken is None
        return
    assert taken is not None
    assert [i for i, _ in taken] == list(range(len(groups)))
    chosen = [groups[i][j] for i, j in taken]
    assert all(sum(c.cost[k] for c in chosen) <= limit for k, limit in enumerate(budget))
    assert sum(c.harm for c in chosen) == best


def test_none_where_the_cheapest_exceeds_the_budget() -> None:
    groups = [[Choice("a", (2.0,), 0), Choice("b", (1.0,), 9)], [Choice("c", (1.0,), 0)]]
    assert allocate(groups, [2.0]) == ["b", "c"]
    assert allocate(groups, [1.999]) is None


def test_each_of_several_budgets_binds() -> None:
    ways = [Choice("slow", (9, 1), 0), Choice("large", (1, 9), 1), Choice("poor", (2, 2), 5)]
    assert allocate([ways], [inf, inf]) == ["slow"]
    assert allocate([ways], [5, inf]) == ["large"]
    assert allocate([ways], [5, 5]) == ["poor"]
    assert allocate([ways], [-inf, 5]) is None


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_what_is_not_finite_is_never_taken(bad: float) -> None:
    assert allocate([[Choice("bad", (1,), bad), Choice("good", (1,), 7)]], [9]) == ["good"]
    assert allocate([[Choice("bad", (bad,), 0), Choice("good", (1,), 7)]], [9]) == ["good"]
    assert allocate([[Choice("bad", (1,), bad)]], [9]) is None


def test_nothing_to_choose() -> None:
    assert allocate([], [1.0]) == []
    assert allocate([], [-1.0]) is None
    assert allocate([[], [Choice("a", (1,), 0)]], [9]) is None


def test_equal_choices_give_the_first() -> None:
    group = [Choice(key, (1.0,), 1.0) for key in "abc"]
    assert allocate([group, group], [2.0]) == ["a", "a"]


def test_small_harms_count_beside_huge_ones() -> None:
    # The second choice's gain is 1e-8 of the harm that the first avoids.
    groups = [
        [Choice("a", (1,), 0), Choice("b", (0,), 1e4)],
        [Choice("c", (1,), 2e-4), Choice("d", (1.1,), 1e-4)],
    ]
    assert allocate(groups, [3]) == ["a", "d"]


def test_negative_harm_is_a_gain() -> None:
    groups = [[Choice("kept", (2,), 0), Choice("split", (1,), -0.5)]]
    assert allocate(groups, [2]) == ["split"]


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="not a number"):
        allocate([[Choice("a", (1,), 0)]], [nan])
    with pytest.raises(ValueError, match="needs 2 costs"):
        allocate([[Choice("a", (1,), 0)]], [1, 1])


def network(layers: int, options: int) -> Groups:
    """Draw layers whose cost falls and whose harm rises with the rank, both with noise."""
    random = np.random.default_rng(3)
    groups: Groups = []
    for i in range(layers):
        full, scale = 10 ** random.uniform(-1, 1), 10 ** random.uniform(-6, -2)
        shares = np.linspace(1, 0.05, options)
        costs = full * shares * random.normal(1, 0.05, options).clip(0.5, 2)
        harms = scale * (1 / shares - 1) ** 2
        groups.append(
            [
                Choice((i, j), (float(c), float(s)), float(h))
                for j, (c, s, h) in enumerate(zip(costs, full * shares, harms, strict=True))
            ]
        )
    return groups


def test_a_deep_network(capfd: pytest.CaptureFixture[str]) -> None:
    groups = network(60, 30)
    whole = [sum(group[0].cost[k] for group in groups) for k in range(2)]
    harms = []
    for share in (0.5, 0.3, 0.2):
        budget = [share * total for total in whole]
        taken = allocate(groups, budget)
        assert taken is not None
        assert taken == allocate(groups, budget)
        chosen = [groups[i][j] for i, j in taken]
        for k, limit in enumerate(budget):
            total = sum(choice.cost[k] for choice in chosen)
            assert total <= limit or isclose(total, limit, rel_tol=1e-9)
        harms.append(sum(choice.harm for choice in chosen))
    assert harms == sorted(harms)
    # A uniform rank at the same cost does more harm.
    uniform = next(j for j in range(30) if all(
        sum(group[j].cost[k] for group in groups) <= 0.2 * whole[k] for k in range(2)
    ))  # fmt: skip
    assert harms[-1] < 0.8 * sum(group[uniform].harm for group in groups)
    assert capfd.readouterr().out == ""


def test_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "SECONDS", 0.0)
    with pytest.raises(PwoptError, match=r"no choice of ranks was found in 0 s"):
        allocate(network(60, 30), [100.0, 100.0])
