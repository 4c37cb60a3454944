"""Other codebases' formats."""
