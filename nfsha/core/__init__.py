"""The decisions: a pure state machine, without I/O, clock, randomness or asyncio."""
