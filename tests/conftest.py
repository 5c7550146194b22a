"""Property tests draw the same examples in every run, and are not timed: CI machines are noisy."""

from hypothesis import settings

settings.register_profile("runner", derandomize=True, deadline=None)
settings.load_profile("runner")
