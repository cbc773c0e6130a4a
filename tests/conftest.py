"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# A busy machine is no reason for a test to fail: single examples have no time limit of their own.
settings.register_profile("nfsha", deadline=None, print_blob=True)
settings.load_profile("nfsha")
