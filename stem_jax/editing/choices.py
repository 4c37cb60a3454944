"""What can be chosen of an edit and of its measurement, for flags that are parsed first."""

# Questions that are made from the corpus of this name, not read from a file.
FACTS = "facts"
# How rows are made where the names have different numbers of tokens: see `swaps`.
STRATEGIES = ("pad_left", "pad_right", "copy", "subset", "average")
# Of the subject's name: one as the donor's, more, fewer, or either of these.
TOKEN_COUNTS = ("one", "more", "fewer", "differing")
# What an edit writes; the token embedding is for contrast.
WRITTEN = ("rows", "embedding")
