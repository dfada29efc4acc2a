"""Measurements that were made once. Each writes one JSON."""
