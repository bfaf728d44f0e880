"""What every test shares: no writing to the user's home, and one thread, as client processes have."""

import os

import torch

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token to the home folder
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)
