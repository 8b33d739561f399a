"""Settings of all tests: one thread, and the same drawn examples in every run."""

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other

settings.register_profile(
    "tests", max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")
