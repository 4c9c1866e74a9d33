"""The mathematics of sampling: noise schedule, timesteps, solvers."""
