"""Attempts to break it: kills, hostile files, hours of work, many records."""
