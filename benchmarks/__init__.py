"""What RESULTS.md quotes, rerunnable: python -m benchmarks.NAME."""
