"""Strategies to read and to begin with."""
