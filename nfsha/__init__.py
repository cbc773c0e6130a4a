"""nfsha: a failover supervisor for a pair of NFS servers."""

__version__ = "0.1.0"
