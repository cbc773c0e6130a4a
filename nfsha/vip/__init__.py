"""The floating address: its lease in the kernel, its announcements, the firewall before NFS."""
