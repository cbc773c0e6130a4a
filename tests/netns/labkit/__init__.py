"""The parts of the netns lab (tests/netns/lab.py): places, wires, servers, clients, observers.

Nothing here imports nfsha: the lab must be able to judge it.
"""
