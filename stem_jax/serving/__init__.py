"""Many requests at once from one model: continuous batching, and a server."""
