"""The commands: talk to the daemon over its socket and render what it says."""
