"""One pass of one volume: what is asked of it, and the runs of rsync that do it."""
