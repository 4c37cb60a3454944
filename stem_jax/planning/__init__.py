"""What a configuration would need on a pod: memory, traffic and time, read from a compiled step."""
