"""The change journal: which folders of a volume changed, and how far that list can vouch."""
