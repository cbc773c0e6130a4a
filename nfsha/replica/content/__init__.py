"""Comparisons by content: files that look equal and are not, or were never replicated."""
