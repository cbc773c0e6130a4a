"""Measurements of nfsha beside what it replaces. Not part of the product, and no test."""
