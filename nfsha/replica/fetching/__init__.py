"""The side that waits: which volume is copied when, what forbids it, and what came of it."""
