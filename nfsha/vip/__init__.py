"""The floating address: its lease in the kernel, its announcements, and the firewall in front of the service."""
