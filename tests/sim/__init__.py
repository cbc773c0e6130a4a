"""The simulator: two production engines on one seeded virtual clock, with the world's faults."""
