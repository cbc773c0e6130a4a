"""The program rsync: its versions, arguments, progress, exit codes, and its process."""
