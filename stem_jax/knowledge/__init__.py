"""What rows hold: edits, and measurements of what they do."""
