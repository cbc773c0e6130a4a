"""The quarantine: what a resync or a repair would overwrite or delete is kept (I4)."""
