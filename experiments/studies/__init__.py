"""Measurements made once, one JSON each."""
