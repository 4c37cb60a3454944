"""Faults against a run of several processes; after each the same command continues it."""
