"""The NFS service that the floating address leads to: is it there, is it version 3 only."""
