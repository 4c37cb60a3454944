"""The tests, in folders as the package: here what they share, and programs as a whole."""
