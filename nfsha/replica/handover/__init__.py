"""The receiving side of a planned move: near to the giver, then equal to it, proved."""
