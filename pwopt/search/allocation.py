"""One choice for each layer: least harm within what the whole may cost. Knows no graph.

The multiple-choice knapsack (Kellerer, Pferschy, Pisinger 2004, "Knapsack Problems", chapter 11),
handed to the solver HiGHS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, isnan
from typing import Any, Generic, TypeVar

import highspy
import numpy as np
import numpy.typing as npt

from pwopt.errors import PwoptError

T = TypeVar("T")
Array = npt.NDArray[np.float64]

SECONDS = 20.0
"""When the solver stops with the best it has; thousands of choices take it one or two."""

GAP = 1e-4
"""The harm found is at most so much, relatively, above the least there is."""


@dataclass(frozen=True)
class Choice(Generic[T]):
    """One way to do a layer.

    Attributes:
        key: What stands for it in the result.
        cost: A number for each budget, in its unit: milliseconds, parameters, MACs.
        harm: Of any unit; harms of layers are added.
    """

    key: T
    cost: tuple[float, ...]
    harm: float


def allocate(groups: Sequence[Sequence[Choice[T]]], budget: Sequence[float]) -> list[T] | None:
    """Take one choice from each group: least total harm, each total cost within its budget.

    A choice whose harm or cost is NaN or infinite is never taken: it could not be measured, or is
    not allowed. An infinite budget does not bind. The same arguments give the same result; of
    choices with equal costs and harm in one group, the first is taken. Costs are compared to one
    part in 10⁹ of the budget.

    Args:
        groups: The choices of each layer.
        budget: The most that each cost may add up to; costs have as many numbers.

    Returns:
        The keys, one for each group; None where nothing fits, as with a group that has no choice.

    Raises:
        ValueError: a budget is NaN, or a cost has more or fewer numbers than the budget.
        PwoptError: the solver found nothing that fits in `SECONDS`, nor that nothing does.
    """
    if any(map(isnan, budget)):
        raise ValueError(f"the budget {tuple(budget)} is not a number")
    if any(len(choice.cost) != len(budget) for group in groups for choice in group):
        raise ValueError(f"every choice needs {len(budget)} costs, one for each budget")
    useful = [_undominated(group) for group in groups]
    if not all(useful) or -np.inf in budget:
        return None
    if not useful:
        return [] if all(limit >= 0 for limit in budget) else None
    choices = [choice for group in useful for choice in group]
    taken = _solve(
        owner=np.repeat(np.arange(len(useful)), [len(group) for group in useful]),
        costs=np.array([choice.cost for choice in choices], np.float64).T,
        harms=np.concatenate([_above_least(group) for group in useful]),
        budget=np.array(budget, np.float64),
    )
    return None if taken is None else [choices[i].key for i in taken]


def _undominated(group: Sequence[Choice[T]]) -> list[Choice[T]]:
    """Drop what is not finite, and what another choice undercuts or equals in harm and costs."""
    finite = [choice for choice in group if all(map(isfinite, (choice.harm, *choice.cost)))]
    kept: list[Choice[T]] = []
    for choice in sorted(finite, key=lambda choice: (choice.harm, choice.cost)):
        if not any(_within(other.cost, choice.cost) for other in kept):
            kept.append(choice)
    return kept


def _within(cost: tuple[float, ...], limit: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(cost, limit, strict=True))


def _above_least(group: Sequence[Choice[Any]]) -> Array:
    """Return the harms less the group's least: nothing else bears on the choice."""
    least = min(choice.harm for choice in group)
    return np.array([choice.harm - least for choice in group], np.float64)


def _solve(
    *, owner: npt.NDArray[np.intp], costs: Array, harms: Array, budget: Array
) -> npt.NDArray[np.intp] | None:
    """Return the number of the choice taken for each owner, in their order; None if none fits.

    owner (choices), ascending; costs (budgets, choices); harms (choices); budget (budgets).
    """
    binding = np.isfinite(budget)
    costs, budget = costs[binding], budget[binding]
    # HiGHS's tolerances are absolute: 1e-6 for a sum's bound, 1e-6 for the gap of the harm.
    unit = 1e-3 * _or_one(np.maximum(np.abs(costs).max(axis=1, initial=0), np.abs(budget)))
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)  # first: whatever follows may print
    # Not by "threads": whatever else uses HiGHS in the process must then set the same number.
    solver.setOptionValue("parallel", "off")
    solver.setOptionValue("mip_rel_gap", GAP)
    solver.setOptionValue("time_limit", SECONDS)
    solver.passModel(
        _program(owner, costs / unit[:, None], harms / (1e-5 * _or_one(harms.max())), budget / unit)
    )
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return None
    if solver.getInfo().primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        return np.flatnonzero(np.array(solver.getSolution().col_value) > 0.5)
    raise PwoptError(
        f"no choice of ranks was found in {SECONDS:.0f} s for {len(owner):,} candidates; "
        "allow more, or bound one thing at a time"
    )


def _program(
    owner: npt.NDArray[np.intp], costs: Array, harms: Array, budget: Array
) -> highspy.HighsLp:
    """Write the problem with a variable for each choice, 1 where it is taken and 0 elsewhere.

    A row for each owner says that one is taken, a row for each budget that it is not exceeded.
    """
    owners, choices, budgets = owner[-1] + 1, len(owner), len(budget)
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = choices, owners + budgets
    program.col_cost_ = harms
    program.col_lower_, program.col_upper_ = np.zeros(choices), np.ones(choices)
    program.integrality_ = [highspy.HighsVarType.kInteger] * choices
    program.row_lower_ = np.concatenate([np.ones(owners), np.full(budgets, -np.inf)])
    program.row_upper_ = np.concatenate([np.ones(owners), budget])
    rows = np.tile(owners + np.arange(budgets), (choices, 1))
    matrix = program.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kColwise
    matrix.start_ = np.arange(choices + 1) * (1 + budgets)
    matrix.index_ = np.column_stack([owner, rows]).ravel()
    matrix.value_ = np.column_stack([np.ones(choices), costs.T]).ravel()
    return program


def _or_one(values: Any) -> Any:
    return np.where(values > 1e-300, values, 1)  # to divide by; smaller ones are as good as 0
