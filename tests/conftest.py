"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# A busy machine is no reason for a test to fail: single examples have no time limit of their own.
# All that matters is named: the library has other defaults where the environment has `CI`.
settings.register_profile(
    "explore", deadline=None, print_blob=True, max_examples=1000, derandomize=False
)

# The examples follow from the test itself, so that one commit has one result: a change never fails
# by an example that nobody has met before. To meet them is what `explore` is for.
settings.register_profile("same", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("same")
