"""The synthetic experiment: 20 prompts, 20 responses, every method of the paper and its peers, whole grids in one call.

>>> from bdpo import toy
>>> table = toy.run_grid(method=toy.PAPER, mask_rate=(0.0, 0.2, 0.4), seed=range(8))
>>> table.groupby(["method", "mask_rate"]).reward.mean()
"""

from bdpo.toy.engine import MEASURES, OPTIONAL, Settings, grid, run, run_grid
from bdpo.toy.methods import METHODS, PAIRS, PAPER, REWARD, coefficients
from bdpo.toy.world import check_mask, draw_mask, log_utility, preference

__all__ = [
    "MEASURES",
    "METHODS",
    "OPTIONAL",
    "PAIRS",
    "PAPER",
    "REWARD",
    "Settings",
    "check_mask",
    "coefficients",
    "draw_mask",
    "grid",
    "log_utility",
    "preference",
    "run",
    "run_grid",
]
