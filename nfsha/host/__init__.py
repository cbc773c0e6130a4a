"""This machine: the journal, the event log, systemd, scheduling, the control socket."""
