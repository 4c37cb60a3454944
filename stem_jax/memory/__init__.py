"""Token-indexed memories: which rows of a table the tokens of a text ask for, and for whom."""
