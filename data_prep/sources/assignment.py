"""The linear assignment problem: each row to a column of its own, with the largest sum of scores."""

from __future__ import annotations

import numpy as np


def best_assignment(scores: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (row, column) of largest total score, min(rows, columns) of them, sorted by row. (n, m) -> pairs

    The Hungarian method with shortest augmenting paths (Jonker and Volgenant 1987), O(n^2 m). Written here
    and not taken from scipy, so that ties are broken the same way wherever shards are built.
    """
    if scores.shape[0] > scores.shape[1]:
        return sorted((row, column) for column, row in best_assignment(scores.T))
    num_rows, num_columns = scores.shape
    costs = -scores.astype(np.float64)
    row_price, column_price = np.zeros(num_rows), np.zeros(num_columns)
    row_of = np.full(num_columns, -1)
    for row in range(num_rows):
        _augment(costs, row, row_price, column_price, row_of)
    return sorted((int(row_of[column]), int(column)) for column in np.flatnonzero(row_of >= 0))


def _augment(
    costs: np.ndarray, row: int, row_price: np.ndarray, column_price: np.ndarray, row_of: np.ndarray
) -> None:
    """Give `row` a column along the cheapest path of re-assignments; prices and `row_of` change in place."""
    num_columns = costs.shape[1]
    distance, came_from = np.full(num_columns, np.inf), np.full(num_columns, -1)
    is_done = np.zeros(num_columns, bool)
    reached, current, column = 0.0, row, -1
    while True:
        through = reached + costs[current] - row_price[current] - column_price
        is_better = ~is_done & (through < distance)
        distance[is_better], came_from[is_better] = through[is_better], column
        column = int(np.where(is_done, np.inf, distance).argmin())
        reached = distance[column]
        is_done[column] = True
        if row_of[column] < 0:
            break
        current = row_of[column]
    row_price[row] += reached
    for other in np.flatnonzero(is_done):
        if row_of[other] >= 0:
            row_price[row_of[other]] += reached - distance[other]
            column_price[other] -= reached - distance[other]
    while column >= 0:
        before = came_from[column]
        row_of[column] = row_of[before] if before >= 0 else row
        column = before
