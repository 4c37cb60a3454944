"""What memories are worth beside a dense model: runs, measures, claims and the page of them."""
