"""Volumes: what is mounted at and below the NFS root, what each bears, what is known of it."""
