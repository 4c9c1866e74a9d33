"""diffusers' schedulers on the noise of Stable Diffusion 1.5: what solvers and losses are compared with."""

from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_GRID = {**_NOISE, "timestep_spacing": "leading", "steps_offset": 1}

SOLVERS = ("ddim", "dpmpp2m", "unipc")
"""Those of our solvers that diffusers has, on the same grid."""


def ddpm() -> DDPMScheduler:
    """Adds noise; holds ``alphas_cumprod``."""
    return DDPMScheduler(**_NOISE)


def scheduler(solver: str) -> Any:
    """diffusers' counterpart of a solver."""
    if solver == "ddim":
        return DDIMScheduler(**_GRID, clip_sample=False, set_alpha_to_one=False)
    if solver == "dpmpp2m":
        kind = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True}
        return DPMSolverMultistepScheduler(**_GRID, **kind, solver_order=2)
    return UniPCMultistepScheduler(**_GRID, solver_order=2, solver_type="bh2")
