"""Where the time of each process of a run goes, over all its starts."""
