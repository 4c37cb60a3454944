"""What a run leaves on disk and how it is read again: by a run that goes on, or by programs."""
