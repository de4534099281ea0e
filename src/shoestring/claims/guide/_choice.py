"""How the claims with a classifier choose the scale of every arm, on a seed of its own."""

from __future__ import annotations

ACCURACY, FRECHET, CALLS = "judge accuracy", "Frechet distance", "network calls"


def choose(tries: dict[float, dict[str, float]], limit: float) -> float:
    """The scale of the highest accuracy among those within the limit of Frechet distance, else of the least.

    Parameters
    ----------
    tries : dict of scale to figures
    limit : float
    """
    within = [scale for scale in tries if tries[scale][FRECHET] <= limit]
    if not within:
        return min(tries, key=lambda scale: tries[scale][FRECHET])
    return max(within, key=lambda scale: tries[scale][ACCURACY])
